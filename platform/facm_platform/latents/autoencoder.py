"""The autoencoder of a latent set, from wherever its weights lie."""

from __future__ import annotations

from facm_core.autoencoders import Autoencoder, IdentityAutoencoder, load_autoencoder
from facm_core.errors import require
from facm_platform import storage
from facm_platform.latents.manifest import LatentManifest


def open_autoencoder(
    address: str, sha256: str | None = None, field: str = "autoencoder"
) -> Autoencoder:
    """The autoencoder ``identity``, or the one whose folder or file lies at `address`.

    Args:
        address: Becomes its id; for formats see `facm_core.autoencoders.load_autoencoder`.
        sha256: The hash it must have.
        field: The one at fault when there is no such autoencoder.

    Raises:
        InvalidInputError: nothing there, not readable, or another autoencoder than it must be.
    """
    if address == IdentityAutoencoder.id:
        autoencoder = load_autoencoder(address, field=field)
    else:
        uri = storage.absolute(address, field)
        storage.check_reachable(uri, field)
        require(storage.exists(uri), field, address, "nothing lies there", "Mend the address")
        with storage.local_copy(uri) as path:
            autoencoder = load_autoencoder(uri, path, field)
    require(
        sha256 in (None, autoencoder.sha256),
        field,
        address,
        f"its hash is {autoencoder.sha256}, where {sha256} was expected",
        "Restore the weights that the latents were made with",
    )
    return autoencoder


def autoencoder_of(manifest: LatentManifest, field: str = "data.uri") -> Autoencoder:
    """The autoencoder that a set was made with; its hash must be the one of the manifest."""
    return open_autoencoder(manifest.autoencoder_id, manifest.autoencoder_sha256, field)
