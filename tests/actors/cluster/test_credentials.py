"""The cluster's key: a file for its owner alone, never overwritten, refused in one sentence where it is not right."""

import base64
import os
import re
import ssl
import stat
import sys

import pytest

from rlx import cli
from rlx.actors.cluster import certificates, credentials
from rlx.actors.cluster.credentials import ClusterKey
from rlx.errors import ConfigError, MissingExtra


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "cluster.key"


@pytest.fixture
def expired(path, monkeypatch):
    monkeypatch.setattr(certificates, "CLOCK_TOLERANCE", certificates.datetime.timedelta(days=3))
    return ClusterKey.create(path, days=-1)


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def test_a_key_is_read_as_it_was_made(path):
    made = ClusterKey.create(path)
    assert ClusterKey.load(path) == made
    assert len(made.token) == 32
    assert path.read_text().startswith("rlx cluster key 1\n")
    assert base64.urlsafe_b64encode(made.token).decode() in path.read_text()


def test_the_file_is_its_owners_alone_from_its_first_byte(path, monkeypatch):
    seen, fsync = [], os.fsync

    def watch(descriptor):
        seen.extend((file.name, mode(file)) for file in path.parent.iterdir())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    before = os.umask(0)
    try:
        ClusterKey.create(path)
        ClusterKey.renew(path)
    finally:
        os.umask(before)
    assert len(seen) == 3 and {m for _, m in seen} == {0o600}
    assert path.name not in seen[0][0].split("-")  # what is being written has another name
    assert mode(path) == 0o600 and mode(path.parent) == 0o700
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_key_is_never_overwritten(path, monkeypatch):
    made = ClusterKey.create(path)
    with pytest.raises(ConfigError, match="exists and is not overwritten"):
        ClusterKey.create(path)
    monkeypatch.setattr(type(path), "exists", lambda _: False)  # somebody else makes it in this moment
    with pytest.raises(ConfigError, match="exists and is not overwritten"):
        ClusterKey.create(path)
    assert ClusterKey.load(path) == made
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_missing_key_is_said_to_be_missing(path):
    with pytest.raises(ConfigError, match=r"there is no cluster key .*cluster\.key: copy it .* or make one with"):
        ClusterKey.load(path)


@pytest.mark.parametrize("bits", [0o604, 0o640, 0o660, 0o644])
def test_a_key_that_others_may_read_is_refused_with_the_command_that_mends_it(path, bits):
    ClusterKey.create(path)
    path.chmod(bits)
    with pytest.raises(ConfigError, match=re.escape(f"mode {bits:04o}") + f".*chmod 600 {re.escape(str(path))}"):
        ClusterKey.load(path)


def broken(text, other):
    """Yield what may become of a key's file, and what is said of it."""
    token = re.search(r"token (\S+)", text)[1]
    pem = credentials._PEM.findall(other)
    assert pem
    own = [match[0] for match in credentials._PEM.finditer(text)]
    foreign = [match[0] for match in credentials._PEM.finditer(other)]
    yield "", "its first line is ''"
    yield "hello", "its first line is 'hello'"
    yield text.replace("key 1", "key 2", 1), "its first line is 'rlx cluster key 2'"
    yield text.replace(f"token {token}\n", ""), "is damaged: it needs a token"
    yield text.replace(token, token[:-8]), "its token is not 32 bytes"
    yield text.replace(token, token[:-1] + "ü"), "its token is not 32 bytes"
    yield text.replace(own[0], ""), "is damaged: it needs a token, a certificate"
    yield text[: len(text) // 2], "is damaged"
    yield text.replace(own[1], foreign[1]), r"is damaged \(KEY_VALUES_MISMATCH\)"
    yield text.replace(own[2], own[2].replace(own[2][60:90], "A" * 30)), r"is damaged \("
    yield text + own[0], "is damaged: it needs"


def test_a_damaged_key_is_refused(path, key, other_key):
    path.parent.mkdir()
    for text, sentence in broken(key.path.read_text(), other_key.path.read_text()):
        path.write_text(text)
        path.chmod(0o600)
        with pytest.raises(ConfigError, match=sentence):
            ClusterKey.load(path)


def test_a_file_that_cannot_be_read_or_written_is_said_to_be(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        ClusterKey.load(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written: "):
        ClusterKey.create(tmp_path / "file" / "cluster.key")


def test_an_expired_key_is_refused_and_renewed_under_its_token(expired, path):
    with pytest.raises(ConfigError, match=r"have expired on \d{4}-\d\d-\d\d: run `rlx certs --renew --out "):
        ClusterKey.load(path)
    renewed = ClusterKey.renew(path)
    assert renewed == ClusterKey.load(path)
    assert renewed.token == expired.token and renewed.authority != expired.authority


def test_a_renewed_key_goes_where_a_link_leads(path, tmp_path):
    made = ClusterKey.create(path)
    link = tmp_path / "link"
    link.symlink_to(path)
    ClusterKey.renew(link)
    assert link.is_symlink() and ClusterKey.load(path).authority != made.authority


def test_secrets_are_not_shown(key):
    assert repr(key) == f"ClusterKey(path={key.path!r})"


def test_only_tls_1_3_with_certificates_on_both_ends_is_spoken(key):
    for context in (key.server_context(), key.client_context()):
        assert context.minimum_version == ssl.TLSVersion.TLSv1_3
        assert context.verify_mode == ssl.CERT_REQUIRED
    assert key.server_context().num_tickets == 0


def test_a_key_is_read_without_cryptography_and_not_made(path, key, monkeypatch):
    monkeypatch.setitem(sys.modules, "rlx.actors.cluster.certificates", None)
    assert ClusterKey.load(key.path) == key
    with pytest.raises(MissingExtra, match=re.escape("pip install 'rlx[cluster]'")):
        ClusterKey.create(path)
    assert not path.exists()


def test_rlx_certs_makes_and_renews_the_file(path, capsys):
    assert cli.main(["certs", "--out", str(path)]) == 0
    assert f"made {path}" in capsys.readouterr().out
    made = ClusterKey.load(path)
    assert cli.main(["certs", "--out", str(path)]) == 2
    assert "is not overwritten" in capsys.readouterr().err
    assert cli.main(["certs", "--out", str(path), "--renew", "--days", "7"]) == 0
    assert f"renewed the certificates in {path} for 7 days" in capsys.readouterr().out
    assert ClusterKey.load(path).token == made.token
    with pytest.raises(SystemExit):
        cli.main(["certs", "--days", "36501"])
    assert "'36501' is more than 36500" in capsys.readouterr().err


def test_rlx_certs_writes_into_the_home_folder_by_default(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cli.main(["certs"]) == 0
    assert ClusterKey.load() == ClusterKey.load(tmp_path / ".rlx" / "cluster.key")
