"""First contact with a GPU: the tests and benchmarks that say most about it in ten minutes. README.md explains them."""
