"""Folders and object stores behind one kind of address: a local path, ``file://`` or ``s3://``.

Credentials, region and endpoint (``AWS_ENDPOINT_URL``) come from the standard environment and
never from an address or an object, so that nothing secret is pickled into Ray or logged.
"""

from facm_platform.storage.files import (
    delete_file,
    exists,
    list_files,
    output_file,
    read_bytes,
    read_text,
    upload_file,
    write_bytes,
)
from facm_platform.storage.folders import local_copy, upload_folder
from facm_platform.storage.uris import absolute, check_reachable, explained, filesystem, join

__all__ = [
    "absolute",
    "check_reachable",
    "delete_file",
    "exists",
    "explained",
    "filesystem",
    "join",
    "list_files",
    "local_copy",
    "output_file",
    "read_bytes",
    "read_text",
    "upload_file",
    "upload_folder",
    "write_bytes",
]
