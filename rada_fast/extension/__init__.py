"""The compiled extension: finding its compilers, building it, and finding and loading its libraries."""
