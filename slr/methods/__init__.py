"""Systems of the literature built from the package's parts, one a module."""
