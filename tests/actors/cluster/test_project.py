"""The user's project on other machines: what is sent, what it costs the second time, and actors that import it."""

import os
import subprocess
import sys
import tarfile
from io import BytesIO
from pathlib import Path

import pytest

from rlx.actors.cluster.project import Project, known, translate, unpack
from rlx.errors import ActorError

pytestmark = pytest.mark.timeout(90)

DRIVER = """
import os, sys
from pathlib import Path
import helper
from rlx import actors

def main():
    with actors.runtime("cluster", address=sys.argv[1], token_file=sys.argv[2], preload=()) as rt:
        print(*rt.spawn(helper.Reader).read.call().result(30), sep="|")

main()
"""
HELPER = """
import os
from pathlib import Path
VERSION = 1

class Reader:
    def read(self):
        return __file__, os.getcwd(), Path("data.txt").read_text(), Path("secret.txt").exists(), VERSION
"""


def git(folder, *arguments):
    subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    """A project with a folder `work`, in which the driver is run."""
    root = tmp_path / "repository"
    work = root / "work"
    work.mkdir(parents=True)
    git(root, "init", "-q")
    (work / "driver.py").write_text(DRIVER)
    (work / "helper.py").write_text(HELPER)
    (work / "data.txt").write_text("tracked")
    (root / "run.sh").write_text("#!/bin/sh\n")
    (root / "run.sh").chmod(0o755)
    (root / "link").symlink_to("run.sh")
    git(root, "add", "-A")
    (work / "secret.txt").write_text("untracked")
    return root


def test_what_git_tracks_is_the_project_as_it_is_on_disk(repository, tmp_path):
    project = Project.around(repository / "work")
    assert project.root == repository
    assert project.files == ("link", "run.sh", "work/data.txt", "work/driver.py", "work/helper.py")
    folder = unpack(project.archive(), project.digest, tmp_path / "home")
    assert folder == known(project.digest, tmp_path / "home")
    assert (folder / "work/data.txt").read_text() == "tracked" and not (folder / "work/secret.txt").exists()
    assert os.access(folder / "run.sh", os.X_OK) and os.readlink(folder / "link") == "run.sh"
    (repository / "work/data.txt").write_text("changed, and not committed")
    changed = Project.around(repository)
    assert changed.digest != project.digest and known(changed.digest, tmp_path / "home") is None
    (repository / "work/data.txt").unlink()
    assert "work/data.txt" not in Project.around(repository).files


def test_outside_of_git_there_is_no_project(tmp_path):
    assert Project.around(tmp_path) is None


def test_a_project_that_is_too_large_is_refused_with_its_largest_files(repository):
    (repository / "video.bin").write_bytes(bytes(3 * 2**20))
    git(repository, "add", "-A")
    with pytest.raises(ActorError, match=r"have 3 MiB, and at most 2 .* video\.bin \(3\.0 MiB\), work/driver\.py"):
        Project.around(repository, 2 * 2**20)


def test_an_archive_that_leaves_its_folder_or_is_another_is_refused(repository, tmp_path):
    project = Project.around(repository)
    data = BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        tar.add(repository / "run.sh", "../../outside")
    for archive in (data.getvalue(), project.archive()[:700], b"no archive"):
        with pytest.raises(ActorError):
            unpack(archive, project.digest, tmp_path / "home")
    with pytest.raises(ActorError, match="changed while it was sent"):
        unpack(project.archive(), "0" * 64, tmp_path / "home")
    assert not (tmp_path / "outside").exists() and list((tmp_path / "home").iterdir()) == []


def test_old_projects_make_room(repository, tmp_path):
    home = tmp_path / "home"
    folders = []
    for number in range(10):
        (repository / "work/data.txt").write_text(str(number))
        project = Project.around(repository)
        folders.append(unpack(project.archive(), project.digest, home))
        os.utime(folders[-1], (number, number))
    assert [folder.is_dir() for folder in folders] == [False] * 2 + [True] * 8


@pytest.mark.parametrize(
    "path, there", [("/p", "/n"), ("/p/work", "/n/work"), ("/pq", "/pq"), ("/usr/lib", "/usr/lib"), ("", "")]
)
def test_paths_inside_the_project_are_inside_it_there(path, there):
    assert translate(path, "/p", Path("/n")) == there
    assert translate(path, None, None) == path


def test_actors_import_the_project_where_it_was_sent(repository, start, key, tmp_path):
    node = start("project", home=tmp_path / "home of the node")
    command = [sys.executable, "driver.py", node.address, str(key.path)]
    seen = []
    for _ in range(2):
        done = subprocess.run(command, cwd=repository / "work", capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        file, cwd, data, secret, version = done.stdout.strip().split("|")
        assert (
            file == f"{cwd}/helper.py" and cwd.startswith(str(tmp_path / "home of the node")) and cwd.endswith("/work")
        )
        assert (data, secret, version) == ("tracked", "False", "1")
        seen.append(Path(cwd).stat().st_ino)
    assert len(set(seen)) == 1  # it was sent once
    (repository / "work/helper.py").write_text(HELPER.replace("VERSION = 1", "VERSION = 2"))
    done = subprocess.run(command, cwd=repository / "work", capture_output=True, text=True, timeout=60)
    assert done.stdout.strip().endswith("|2"), done.stderr
