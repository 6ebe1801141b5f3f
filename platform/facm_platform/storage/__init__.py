"""Folders and object stores behind one kind of address: a local path, ``file://`` or ``s3://``.

Credentials, region and endpoint (``AWS_ENDPOINT_URL``) come from the standard environment and
never from an address or an object, so that nothing secret is pickled into Ray or logged.
"""

from facm_platform.storage.failures import explained
from facm_platform.storage.files import (
    SMALL_BYTES,
    create_bytes,
    delete_file,
    exists,
    file_sha256,
    list_files,
    output_file,
    read_bytes,
    read_text,
    upload_file,
    write_bytes,
)
from facm_platform.storage.folders import empty_folder, local_copy, node_copy, upload_folder
from facm_platform.storage.listing import iter_files
from facm_platform.storage.stores import check_reachable, filesystem
from facm_platform.storage.uris import absolute, join

__all__ = [
    "SMALL_BYTES",
    "absolute",
    "check_reachable",
    "create_bytes",
    "delete_file",
    "empty_folder",
    "exists",
    "explained",
    "file_sha256",
    "filesystem",
    "iter_files",
    "join",
    "list_files",
    "local_copy",
    "node_copy",
    "output_file",
    "read_bytes",
    "read_text",
    "upload_file",
    "upload_folder",
    "write_bytes",
]
