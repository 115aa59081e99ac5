"""Nothing is confirmed of a certified model that was changed, or of a changed certificate."""

import shutil
from random import Random

import onnx
import pytest
from decoders import Config, Decoder
from mutating.tampering import FILES, FORMS, STATEMENTS, Certified

import kvsurgeon
from kvsurgeon.errors import CertificateError, Code, InvalidCertificateError, UnsupportedError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with an original with its weights in a file, the result, and the certificate."""
    folder = tmp_path_factory.mktemp("certified")
    (folder / "original").mkdir()
    outside = {"save_as_external_data": True, "location": "model.data", "size_threshold": 512}
    onnx.save(Decoder(Config()).model(), folder / "original" / "model.onnx", **outside)
    (folder / "original" / "config.json").write_text('{"model_type": "tiny"}')
    kvsurgeon.inject(folder / "original", folder / "result", effort="quick", certificate=folder / "certificate.json")
    return folder


@pytest.fixture
def given(made, tmp_path):
    shutil.copytree(made, tmp_path / "copy")
    folder = tmp_path / "copy"
    paths = {"original": folder / "original" / "model.onnx", "result": folder / "result" / "model.onnx"}
    return Certified(certificate=folder / "certificate.json", random=Random(4), **paths)


def test_the_unchanged_copy_is_confirmed(given):
    assert kvsurgeon.confirm(given.certificate, given.result).repeated.ok


@pytest.mark.parametrize("kind", STATEMENTS)
def test_a_changed_statement_is_found(given, kind):
    given.edit(STATEMENTS[kind])
    expected = UnsupportedError if kind == "another version" else CertificateError
    with pytest.raises(expected) as raised:
        kvsurgeon.confirm(given.certificate, given.result)
    assert raised.value.code in (Code.NOT_CONFIRMED, Code.NOT_CONFIRMABLE)


@pytest.mark.parametrize("kind", FORMS)
def test_another_form_is_no_certificate(given, kind):
    given.edit(FORMS[kind])
    with pytest.raises(InvalidCertificateError):
        kvsurgeon.confirm(given.certificate, given.result)


@pytest.mark.parametrize("kind", FILES)
def test_a_changed_file_is_found(given, kind):
    change, _ = FILES[kind]
    assert change(given) is not None
    with pytest.raises((CertificateError, InvalidCertificateError)):
        kvsurgeon.confirm(given.certificate, given.result)
