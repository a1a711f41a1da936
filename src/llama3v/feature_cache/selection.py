"""Which of the fingerprints under a cache's root a reader gets, and why none fits where none does."""

from pathlib import Path

from llama3v.config import EncodeConfig
from llama3v.errors import CacheError
from llama3v.feature_cache.codecs import CODECS, PIXELS
from llama3v.feature_cache.layout import CachePaths, Manifest, differences, fingerprint_of, fingerprints, read_manifest


def choose_fingerprint(root: Path, manifest: Manifest | None, fingerprint: str | None) -> str:
    """The fingerprint that is asked for, if the root has it. Arguments and errors as of `CacheReader`."""
    found = fingerprints(root)
    if manifest is not None and "codec" not in manifest:
        manifest = _with_codec(root, manifest, found)
    wanted = fingerprint_of(manifest) if manifest is not None else fingerprint
    if manifest is not None and fingerprint not in (None, wanted):
        raise CacheError(f"asked for fingerprint {fingerprint} and for a manifest that hashes to {wanted}; give one")
    if wanted is None:
        if len(found) == 1:
            return found[0]
        raise CacheError(
            f"{root} holds {len(found)} fingerprints ({', '.join(found) or 'none'}); say which one: "
            f"`llama3v cache info {root}` shows them in words"
        )
    if wanted in found:
        return wanted
    raise CacheError(f"{root} has no features of this kind: {_why_foreign(root, found, wanted, manifest)}")


def encode_option(codec: str) -> str:
    """What `llama3v encode` needs beside its default options to fill a cache of this codec."""
    options = {EncodeConfig.codec: "", PIXELS.name: " --mode pixels"}
    return options.get(codec, f" --codec {codec}")


def _with_codec(root: Path, manifest: Manifest, found: list[str]) -> Manifest:
    """The manifest with the one codec in which the root has such features; as it is where it has none."""
    manifests = {name: {**manifest, "codec": name} for name in CODECS}
    present = [name for name, candidate in manifests.items() if fingerprint_of(candidate) in found]
    if len(present) > 1:
        raise CacheError(
            f"{root} holds these features in {len(present)} codecs ({', '.join(present)}); say which one to read: "
            f"--codec {present[0]}"
        )
    return manifests[present[0]] if present else manifest


def _why_foreign(root: Path, found: list[str], wanted: str, manifest: Manifest | None) -> str:
    if not found:
        return "it holds no cache at all; run `llama3v encode`"
    if manifest is None:
        return f"asked for fingerprint {wanted}, found {', '.join(found)}"
    phrases = []
    for name in found:
        cached = read_manifest(CachePaths(root, name))
        different = "; ".join(differences(cached, {"codec": cached.get("codec"), **manifest}))
        phrases.append(f"{name} differs in {different}")
    return " | ".join(phrases) + "; encode with these options, or name the vision tower the cache was made with"
