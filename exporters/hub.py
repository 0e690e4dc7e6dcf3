"""An export on the Hub: uploaded as it lies there, once engines have found it right.

Rules:
1. Nothing is uploaded but by `push_export`, and only to the repository that the user names.
2. The export keeps its contract, and the verification beside it is about these files.
3. The files of the manifest are uploaded, with the manifest and the verification, and nothing else that may
   lie in the directory.
4. Who may write is the business of the Hub's own client: its token is never read here, and in no message.
"""

from __future__ import annotations

from pathlib import Path

from qpa.documents import MANIFEST_PATH, Manifest, read_manifest
from qpa.documents.manifest import FORMATS
from qpa.documents.verification import VERIFICATION_PATH, read_verification
from qpa.errors import ExportError, OptionError, one_sentence


def push_export(directory: Path, repo: str, *, public: bool = False) -> str:
    """Upload a verified export to a repository of the Hub, which is made where there is none.

    Args:    repo: "user/name".
             public: whether a new repository is for everybody to see; one that exists stays what it is.
    Returns: the address of the commit.
    Raises:  DocumentError: the directory is no export, or its manifest or verification is damaged.
             ExportError: it is not verified, or the Hub does not take it.
             OptionError: the Hub cannot have a repository of this name.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    files = _verified_files(directory)
    api = HfApi()
    try:
        api.create_repo(repo, private=not public, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=directory,
            allow_patterns=files,
            commit_message="Upload an adapter made by qpa",
        )
    except HFValidationError as error:
        raise OptionError("repo", "a name such as user/adapter", repo) from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        advice = "log in with: hf auth login" if getattr(error, "response", None) is not None else ""
        raise ExportError(repo, "a repository that can be written to", one_sentence(error), advice) from error
    return str(commit.commit_url)


def _verified_files(directory: Path) -> list[str]:
    """Return the names of the files of an export that engines have found right."""
    manifest = read_manifest(directory)
    _check_files(directory, manifest)
    verification = read_verification(directory)
    advice = f"verify it first: qpa verify {directory}"
    if verification is None:
        raise ExportError(str(directory), "an export that is verified", "one that is not", advice)
    if not verification.is_of(directory):
        raise ExportError(str(directory), "a verification of this export", "one of another export", advice)
    return [*(entry.file for entry in manifest.files), MANIFEST_PATH, VERIFICATION_PATH]


def _check_files(directory: Path, manifest: Manifest) -> None:
    findings = FORMATS[manifest.format].findings(directory, manifest)
    if findings:
        first = findings[0]
        subject = f"{directory}: {first.rule} {first.subject}"
        raise ExportError(subject, first.expected, first.found, "export again")
