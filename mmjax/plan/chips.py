"""The chips that can be planned for: what they compute, hold and send.

           peak bf16   HBM usable   HBM rate    link    slices' network
  v5e      197 T/s     15.75 GiB    819 GB/s    45 x 4  3.1 GB/s
  v5p      459         95.73        2,765       90 x 6  6.3
  ...

All numbers are of one device, the unit that JAX shows; a tpu7x chip is two devices, so
its chip's numbers are halved. Where they are from:

  peak, HBM rate   Google's pages of the chip: docs.cloud.google.com/tpu/docs/v4, /v5e,
                   /v5p, /v6e, /tpu7x ("peak compute per chip", "HBM bandwidth")
  slices' network  the same pages, "data center network bandwidth", shared evenly by the
                   chips; v4's isn't stated: assumed to be that of v5p
  usable HBM       what libtpu 0.0.42 and 0.0.50 name as available when a program doesn't
                   fit; it is less than the memory built in
  clock            chosen so that libtpu's estimated cycles put bf16 matrix products of
                   4,096 x 4,096 x 4,096 and 8,192 x 4,096 x 16,384 at 0.88-0.97 (v4),
                   0.97-0.98 (v5e), 0.84-0.96 (v5p), 0.87-0.92 (v6e) and 0.83-0.85
                   (tpu7x) of the peak; the vendor states none
  link             assumed: one direction of one link, 45 GB/s (v4, v5e) or 90 GB/s (v5p,
                   v6e, tpu7x); somewhat under the pages' totals per chip
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
  """Rates of one device.

  Attributes:
    name: the family, as libtpu spells it.
    peak: bf16 FLOP/s.
    clock: Hz that turn libtpu's estimated cycles into seconds.
    hbm: usable bytes.
    hbm_rate: bytes/s.
    link: bytes/s of one link in one direction.
    dcn: bytes/s to other slices.
    axes: physical axes of the torus; a full one has two links, an open one one.
    wrap: an axis is closed to a ring where its length is a multiple of this.
    devices: devices a chip.
    cores: TensorCores a chip; users count v4, v5p and tpu7x by cores.
    largest: most chips of one slice.
  """

  name: str
  peak: float
  clock: float
  hbm: int
  hbm_rate: float
  link: float
  dcn: float
  axes: int
  wrap: int
  devices: int
  cores: int
  largest: int


def _chip(name, peak, clock, hbm, hbm_rate, link, dcn, axes, wrap, devices, cores, most):
  return Chip(
    name, peak * 1e12, clock * 1e9, int(hbm * GIB), hbm_rate * 1e9, link * 1e9,
    dcn * 1e9, axes, wrap, devices, cores, most,
  )  # fmt: skip


CHIPS: dict[str, Chip] = {
  chip.name: chip
  for chip in (
    _chip('v4', 275, 1.05, 30.75, 1200, 45, 6.25, 3, 4, 1, 2, 4096),
    _chip('v5e', 197, 1.5, 15.75, 819, 45, 3.125, 2, 16, 1, 1, 256),
    _chip('v5p', 459, 1.75, 95.73, 2765, 90, 6.25, 3, 4, 1, 2, 6144),
    _chip('v6e', 918, 1.75, 31.24, 1638, 90, 12.5, 2, 16, 1, 1, 256),
    _chip('tpu7x', 2307 / 2, 2.2, 94.74, 7380 / 2, 90, 6.25, 3, 4, 2, 2, 9216),
  )
}
