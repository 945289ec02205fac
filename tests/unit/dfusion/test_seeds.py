import hashlib

from dfusion.seeds import evaluation_seed, sample_seed, training_seed


def test_a_seed_is_the_first_53_bits_of_the_digest_of_its_parts() -> None:
    digest = hashlib.sha256(b'["sample", 7, 2, 0, "a star", 3]').hexdigest()
    assert sample_seed(7, 2, 0, "a star", 3) == int(digest[:16], 16) // 2**11


def test_every_part_changes_the_seed() -> None:
    seeds = {
        sample_seed(7, 2, 0, "a star", 3),
        sample_seed(8, 2, 0, "a star", 3),
        sample_seed(7, 3, 0, "a star", 3),
        sample_seed(7, 2, 1, "a star", 3),
        sample_seed(7, 2, 0, "a circle", 3),
        sample_seed(7, 2, 0, "a star", 4),
        evaluation_seed(7, "train", 0, "a star", 3),
        evaluation_seed(7, "held_out", 0, "a star", 3),
        training_seed(7, 2),
    }

    assert len(seeds) == 9
    assert all(0 <= seed < 2**53 for seed in seeds)
