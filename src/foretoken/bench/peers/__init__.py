"""Peers: other systems that the bench runs beside Foretoken. One file each, one line each here."""

from __future__ import annotations

from foretoken.bench.peers.base import Peer
from foretoken.core.registry import Registry

PEERS: Registry[type[Peer]] = Registry(
    "peer",
    {
        "transformers": "foretoken.bench.peers.transformers_peer:TransformersPeer",
        "llama.cpp": "foretoken.bench.peers.llama_cpp:LlamaCppPeer",
        "openvino": "foretoken.bench.peers.openvino:OpenVinoPeer",
    },
    group="foretoken.peers",
)
