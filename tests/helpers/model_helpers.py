"""Small models."""

from lipjax.models import LiResNet


def tiny(**options):
    """A LiResNet of two blocks on images (8, 8, 1)."""
    sizes = {"depth": 2, "width": 4, "stem_kernel": 3, "stem_strides": 1, "stem_padding": 1, **options}
    return LiResNet(input_shape=(8, 8, 1), num_classes=3, **sizes)
