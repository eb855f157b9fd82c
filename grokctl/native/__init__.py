"""The kernel of CPUs: C++ sources, and the library that is built of them."""
