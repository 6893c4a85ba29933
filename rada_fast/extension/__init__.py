"""The compiled extension: where its compilers are, how it is built, and how a library is found and loaded."""
