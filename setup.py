"""What pyproject.toml cannot express: launchers/ is installed as `dlora.launchers`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["dlora", "dlora.*"]), "dlora.launchers"],
    package_dir={"dlora.launchers": "launchers"},
)
