"""The image's MLflow server with login, over TLS, in a network of namespaces."""

from __future__ import annotations

import secrets
import subprocess
import sys

from tests.infra.namespaces import GATEWAY, Network
from tests.jobs.conftest import ROOT

HOST = f"{GATEWAY}:5001"


class Tracking:
    """The server, which ends with its network.

    Attributes:
        certificate: What its clients trust.
        credentials: Its administrator's, as a client's ``~/.mlflow/credentials``.
    """

    def __init__(self, network: Network) -> None:
        place = network.folder / "mlflow"
        place.mkdir(mode=0o700)
        passwords = {
            name: secrets.token_urlsafe(24)
            for name in ("mlflow_admin_password", "mlflow_flask_secret", "postgres_password")
        }
        for name, password in passwords.items():
            (place / name).write_text(password)
        key, certificate = place / "key.pem", place / "certificate.pem"
        request = ["openssl", "req", "-x509", "-nodes", "-newkey", "rsa:2048", "-days", "1"]
        request += ["-subj", "/CN=mlflow", "-addext", f"subjectAltName=IP:{GATEWAY}"]
        request += ["-keyout", str(key), "-out", str(certificate)]
        subprocess.run(request, check=True, capture_output=True)
        self.certificate = certificate.read_text()
        password = passwords["mlflow_admin_password"]
        self.credentials = (
            f"[mlflow]\nmlflow_tracking_username=admin\nmlflow_tracking_password={password}\n"
        )
        address, _, port = HOST.partition(":")
        environment = {
            "HOST": address,
            "PORT": port,
            "WORKERS": "1",
            "PATH": f"{sys.prefix}/bin:/usr/bin:/bin",
            "SECRETS": place,
            "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{place / 'mlflow.db'}",
            "MLFLOW_ARTIFACTS_DESTINATION": place / "artifacts",
            "MLFLOW_SERVER_ALLOWED_HOSTS": HOST,
        }
        command = ["env", *(f"{name}={value}" for name, value in environment.items())]
        command += ["sh", str(ROOT / "infra" / "docker" / "run"), "mlflow"]
        command += ["--uvicorn-opts", f"--ssl-keyfile={key} --ssl-certfile={certificate}"]
        with (network.folder / "mlflow.log").open("wb") as log:
            network.start(*command, output=log)
