"""``serve``: a generator artifact behind HTTP."""

from __future__ import annotations

import argparse
import ipaddress
import logging
import socket
import sys

from trivium.compiler.commands import console
from trivium.compiler.errors import BadInput, ToolchainMissing


def serve(arguments: argparse.Namespace) -> int:
    """Serve until interrupted."""
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ToolchainMissing(
            f"{error.name} is not installed", about="serve", remedy="pip install 'trivium[serve]'"
        ) from error
    from trivium.compiler.generation.text import TextGenerator
    from trivium.compiler.serving.app import Limits, Server

    generator = TextGenerator(
        arguments.artifact,
        rows=arguments.rows,
        capacity=arguments.context,
        speculate=arguments.speculate,
        exact=arguments.exact,
    )
    name = arguments.name or generator.artifact.path.resolve().name
    server = Server(generator, name, Limits(arguments.queue, arguments.deadline))
    listening = _listen(arguments.host, arguments.port)
    host, port = listening.getsockname()[:2]
    if not ipaddress.ip_address(host).is_loopback:
        console.warn(f"{host} can be reached from other machines, and nothing asks who calls")
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    print(f"serving {name} at http://{host}:{port}/v1 ({generator.decoder.where})", flush=True)
    config = uvicorn.Config(server.application(), log_level="warning", lifespan="on")
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    return 0


_WAITING = 2048
"""Connections that wait to be taken, at most; what uvicorn asks for as well."""


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(_WAITING)  # whoever reads where it is may ask at once
    except (OSError, OverflowError) as error:
        raise BadInput(
            f"cannot listen there ({error})", about=f"{host}:{port}", remedy="give another --port"
        ) from error
    return listening
