"""`python -m plugmesh.cli`, for environments whose scripts are not on the PATH."""

from plugmesh.cli import main

if __name__ == "__main__":
    main()
