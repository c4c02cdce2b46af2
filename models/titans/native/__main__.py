"""Compile the kernels beside their sources: for an image or a package that is to run without a compiler."""

from titans.native.build import FOLDER, compile_into

if __name__ == "__main__":
    compile_into(FOLDER)
