"""A certificate and its key, or which of the two cannot be used; nobody is asked for anything."""

import shutil
import subprocess

import pytest

from grokctl.errors import UsageError
from grokctl.serving.certificates import tls_context

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("with space")
    curve = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-subj", "/CN=localhost"]
    for name in ("one", "other"):
        files = ["-keyout", f"{name}.key", "-out", f"{name}.pem"]
        openssl(folder, "req", "-x509", "-nodes", *curve, *files)
    secret = ["-aes256", "-passout", "pass:secret"]
    openssl(folder, "pkey", "-in", "one.key", "-out", "locked.key", *secret)
    (folder / "empty").write_bytes(b"")
    return folder


def openssl(folder, *arguments):
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def test_a_certificate_and_its_key_encrypt(folder):
    assert tls_context(folder / "one.pem", folder / "one.key").get_ca_certs() == []


def test_a_key_with_a_pass_phrase_is_refused_without_a_question(folder, capfd):
    with pytest.raises(
        UsageError, match=r"tls_key .*: expected a key without a pass phra"
    ) as caught:
        tls_context(folder / "one.pem", folder / "locked.key")

    assert caught.value.exit_code == 2
    assert caught.value.hint == f"openssl pkey -in '{folder / 'locked.key'}' -out plain.pem"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("certificate", "key", "words"),
    [
        ("one.pem", "other.key", r"tls_cert .*one.pem: expected a certificate in PEM, and its key"),
        ("one.key", "one.pem", r"tls_cert .*one.key: expected a certificate in PEM"),
        ("empty", "empty", r"tls_cert .*empty: expected a certificate in PEM"),
        ("nothing", "one.key", r"tls_cert .*nothing: No such file or directory"),
        ("one.pem", "nothing", r"tls_key .*nothing: No such file or directory"),
        ("one.pem", ".", r"tls_key .*: Is a directory"),
    ],
)
def test_files_that_cannot_be_used_are_named(folder, certificate, key, words):
    with pytest.raises(UsageError, match=words):
        tls_context(folder / certificate, folder / key)
