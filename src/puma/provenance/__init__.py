"""Whether what lies in a folder is whole, and was made from what it says it was made from.

`verify` is the front door. `artefacts` checks one file at a time, `tables` the parts of a margin table together, and
`links` compares the fingerprints that artefacts carry of each other.
"""

from puma.provenance.verify import Verification, verify

__all__ = ["Verification", "verify"]
