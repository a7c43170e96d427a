"Everything about the package stands in settings.ini; this file hands it to setuptools."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
ini = ConfigParser(delimiters=["="])
ini.read(here / "settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]


def lines(key):
    return [line.strip() for line in cfg[key].splitlines() if line.strip()]


def readme():
    "README.md with links that lead to the repository from anywhere, as from PyPI's page."
    text = (here / "README.md").read_text(encoding="utf-8")
    text = text.replace("](nbs/images/", f"]({cfg['git_url']}/raw/{cfg['branch']}/nbs/images/")
    return re.sub(r"\]\((?=nbs/)", f"]({cfg['git_url']}/blob/{cfg['branch']}/", text)


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme(),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    packages=find_packages(include=["rsna_seg", "rsna_seg.*"]),
    include_package_data=True,
    python_requires=f">={cfg['min_python']}",
    install_requires=lines("requirements"),
    extras_require={
        extra: lines(f"{extra}_requirements")
        for extra in ("engines", "track", "nbs", "bench", "dev")
    },
    entry_points={
        "console_scripts": lines("console_scripts"),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
    },
)
