"""What stages send each other: activations down the pipeline, chosen tokens back to its start.

Latency + bytes / bandwidth for each message. Lengths may be numpy arrays; times are seconds.
The devices of one stage exchange in a ring: each passes on a part at a time, all at once, as in
Patarasu and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations" (2009).
Not covered: two transfers that share a wire at the same moment; trees, which have fewer
latencies and suit small messages.
"""

from typing import Any

from llmpq.cluster import Cluster, Link
from llmpq.model_spec import ModelSpec

VALUE_BYTES = 2  # of an activation
TOKEN_BYTES = 8
LOGIT_BYTES = 4
HEADER_NUMBERS = 16, 6  # of a job, and of each of its requests

Tokens = Any  # a number of tokens, or a numpy array of them
Seconds = Any  # a float, or a numpy array like the tokens asked for


def activation_message_bytes(spec: ModelSpec, num_tokens: Tokens) -> Tokens:
    """Hidden states of `num_tokens` tokens."""
    return num_tokens * spec.hidden_size * VALUE_BYTES


def header_bytes(requests: int) -> int:
    """What says which job comes: numbers of it, and of each of its requests."""
    of_job, of_request = HEADER_NUMBERS
    return TOKEN_BYTES * (of_job + of_request * requests)


def message_s(cluster: Cluster, node: str, other: str, num_bytes: Tokens) -> Seconds:
    """Time of one message from a device on `node` to one on `other`."""
    return cluster.link_between(node, other).seconds(num_bytes)


def prefill_s(
    cluster: Cluster, node: str, other: str, spec: ModelSpec, requests: int, prompt_tokens: Tokens
) -> Seconds:
    """Hand-over of a prefill micro-batch to the next stage, the job's header before it."""
    num_bytes = activation_message_bytes(spec, requests * prompt_tokens) + header_bytes(requests)
    return message_s(cluster, node, other, num_bytes)


def decode_s(cluster: Cluster, node: str, other: str, spec: ModelSpec, requests: int) -> Seconds:
    """Hand-over of a decode micro-batch to the next stage, the job's header before it."""
    num_bytes = activation_message_bytes(spec, requests) + header_bytes(requests)
    return message_s(cluster, node, other, num_bytes)


def tokens_back_s(cluster: Cluster, node: str, other: str, requests: int) -> Seconds:
    """The chosen tokens of a micro-batch, from the last stage to the first."""
    return message_s(cluster, node, other, requests * TOKEN_BYTES)


def all_reduce_s(link: Link, degree: int, num_bytes: Tokens) -> Seconds:
    """`degree` devices sum `num_bytes` each; 0 for one device.

    A round to sum the parts and one to spread them: 2 (degree - 1) messages of a part each.
    """
    return 2 * (degree - 1) * link.seconds(num_bytes / degree)


def best_token_s(link: Link, degree: int, requests: int) -> Seconds:
    """Each device tells all others its best token of every request, and that token's logit."""
    return (degree - 1) * link.seconds(requests * (LOGIT_BYTES + TOKEN_BYTES))
