"""The naive design, kept as the baseline: Flask, requests with a new connection each time, botocore signing all anew.

Run by gunicorn with threads; the upstream's URL comes from BENCHMARK_UPSTREAM, credentials from the environment.
"""

from __future__ import annotations

import os

import requests
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials
from flask import Flask, Response, request

from benchmarks.aws import ARN, ARN_HEADER, REGION, SERVICE

PASSED = ("Accept", "Content-Type", "User-Agent")
DROPPED = ("connection", "keep-alive", "transfer-encoding")
METHODS = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"]
CHUNK = 64 << 10

app = Flask(__name__, static_folder=None)
credentials = Credentials(os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"])


@app.route("/", defaults={"_path": ""}, methods=METHODS)
@app.route("/<path:_path>", methods=METHODS)
def relay(_path: str) -> Response:
    """Sign this request and send it on; the answer's body is streamed."""
    body = request.get_data()
    headers = {name: request.headers[name] for name in PASSED if name in request.headers} | {ARN_HEADER: ARN}
    url = os.environ["BENCHMARK_UPSTREAM"] + request.full_path.rstrip("?")
    signed = AWSRequest(request.method, url, headers=headers, data=body)
    SigV4Auth(credentials, SERVICE, REGION).add_auth(signed)
    answer = requests.request(
        request.method, url, headers=dict(signed.headers), data=body, stream=True, timeout=60, allow_redirects=False
    )
    kept = [(name, value) for name, value in answer.headers.items() if name.lower() not in DROPPED]
    return Response(answer.raw.stream(CHUNK, decode_content=False), answer.status_code, kept)
