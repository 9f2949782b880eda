"""From a checkpoint to a certificate: certification, attacks, tables and the HTML report."""
