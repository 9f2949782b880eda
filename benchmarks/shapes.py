"""Image shape and number of classes of the data sets, so that benchmarks need none of them."""

SHAPES = {
    "digits": ((8, 8, 1), 10),
    "mnist": ((28, 28, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "tiny_imagenet": ((64, 64, 3), 200),
    "imagenet": ((224, 224, 3), 1000),
}
