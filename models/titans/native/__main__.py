"""Compile the kernels beside their source: for an image or a package that is to run without a compiler."""

from titans.native.build import _SOURCE, compile_into

if __name__ == "__main__":
    compile_into(_SOURCE.parent)
