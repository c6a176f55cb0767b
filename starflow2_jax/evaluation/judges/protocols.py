"""The benchmarks whose trees a judge can score."""

from starflow2_jax.evaluation.judges import gedit, imgedit, kris, rise, wise

PROTOCOLS = {
    "gedit": gedit.PROTOCOL,
    "imgedit": imgedit.PROTOCOL,
    "kris": kris.PROTOCOL,
    "rise": rise.PROTOCOL,
    "wise": wise.PROTOCOL,
    "wise_verified": wise.VERIFIED_PROTOCOL,
}
