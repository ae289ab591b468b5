import typer

from .gpu_suite import main

if __name__ == "__main__":
    typer.run(main)
