"""How weights are rounded when they are loaded: by a rule, or with the help of calibration data.

A plan carries the quantizer its sensitivity was measured with, and a run uses that one: what is
served is what was measured.
"""

from typing import Literal

from pydantic import model_validator

from llmpq.artifact import Strict

Method = Literal["rtn", "mse", "gptq"]


class Quantizer(Strict):
    """rtn: to nearest, the grid covers all weights. mse: to nearest, the grid is cut for the least
    squared error. gptq: column by column, what is lost is made up for in the columns to come; from
    `moments`, a file of the second moments of each linear's inputs, whose SHA-256 is `sha256`.
    """

    method: Method = "rtn"
    moments: str | None = None
    sha256: str | None = None

    @model_validator(mode="after")
    def _check(self) -> "Quantizer":
        if (self.method == "gptq") != (self.moments is not None):
            raise ValueError("gptq needs 'moments', a file; other methods take none")
        return self
