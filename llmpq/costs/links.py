"""What stages send each other: activations down the pipeline, chosen tokens back to its start.

Latency + bytes / bandwidth for each message. Lengths may be numpy arrays; times are seconds.
Not covered: two transfers that share a wire at the same moment.
"""

from llmpq.cluster import Cluster
from llmpq.costs.latency import Seconds, Tokens
from llmpq.model_spec import ModelSpec

VALUE_BYTES = 2  # of an activation
TOKEN_BYTES = 8


def activation_message_bytes(spec: ModelSpec, num_tokens: Tokens) -> Tokens:
    """Hidden states of `num_tokens` tokens."""
    return num_tokens * spec.hidden_size * VALUE_BYTES


def message_s(cluster: Cluster, node: str, other: str, num_bytes: Tokens) -> Seconds:
    """Time of one message from a device on `node` to one on `other`."""
    return cluster.link_between(node, other).seconds(num_bytes)


def prefill_s(
    cluster: Cluster, node: str, other: str, spec: ModelSpec, requests: int, prompt_tokens: Tokens
) -> Seconds:
    """Hand-over of a prefill micro-batch to the next stage."""
    num_bytes = activation_message_bytes(spec, requests * prompt_tokens)
    return message_s(cluster, node, other, num_bytes)


def decode_s(cluster: Cluster, node: str, other: str, spec: ModelSpec, requests: int) -> Seconds:
    """Hand-over of a decode micro-batch to the next stage."""
    return message_s(cluster, node, other, activation_message_bytes(spec, requests))


def tokens_back_s(cluster: Cluster, node: str, other: str, requests: int) -> Seconds:
    """The chosen tokens of a micro-batch, from the last stage to the first."""
    return message_s(cluster, node, other, requests * TOKEN_BYTES)
