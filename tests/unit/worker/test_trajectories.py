import torch

from dfusion.config import SamplingConfig
from dfusion.types import Trajectory
from worker.trajectories import join


def trajectory(seeds: tuple[int, ...], items: int) -> Trajectory:
    batch = len(seeds)
    return Trajectory(
        torch.full((batch, 3, 4, 2, 2), float(seeds[0])),
        torch.tensor([501, 1]),
        torch.zeros(batch, 2),
        seeds,
        SamplingConfig(num_steps=2),
        torch.full((batch, 2, 1, 1, items), 0.5),
        tuple(tuple((k,) for k in range(items)) for _ in seeds),
    )


def test_joined_rows_keep_their_order_and_maps_get_the_largest_k() -> None:
    joined = join([trajectory((1, 2), items=1), trajectory((3,), items=2)])
    assert joined.seeds == (1, 2, 3)
    assert joined.latents[:, 0, 0, 0, 0].tolist() == [1.0, 1.0, 3.0]
    assert joined.items == (((0,),), ((0,),), ((0,), (1,)))
    assert joined.item_maps is not None
    assert joined.item_maps[:, 0, 0, 0].tolist() == [[0.5, 0.0], [0.5, 0.0], [0.5, 0.5]]
