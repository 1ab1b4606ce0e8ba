# SPDX-License-Identifier: Apache-2.0
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from flax_vlm.losses.contrastive import sigmoid_contrastive_loss, softmax_contrastive_loss
from flax_vlm.losses.contrastive_sharded import (
    sigmoid_contrastive_loss_sharded,
    softmax_contrastive_loss_sharded,
    split,
)
from flax_vlm.losses.hard_negatives import HardNegatives, mine, number_pairs
from flax_vlm.losses.pairs import DEFAULT_RULES, PairRules, Pairs, arrange, draws, tile_masks
from flax_vlm.losses.ring import Ring
from flax_vlm.losses.ring_mining import mine_on_ring
from tests.losses import oracle
from tests.losses.comparison import distance, make_pairs, value_and_gradients

KEY = jax.random.key(4)


def mesh(devices):
    return jax.make_mesh(
        (devices, 1, 1),
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
        devices=jax.devices()[:devices],
    )


# dense, and sharded over every number of devices with tiles that fit and that do not
RINGS = [
    None,
    Ring(5),
    Ring(7, mesh=mesh(2)),
    Ring(5, mesh=mesh(4)),
    Ring(2, mesh=mesh(8), bidirectional=True),
]
DEVICES = ["dense", "1 device", "2 devices", "4 devices", "8 devices"]


def mined_masks(case, negatives, ring=None, rules=DEFAULT_RULES, pairs=None):
    """(row, column) negatives [B, M] that mining leaves, of the dense form or of a ring."""
    pairs = pairs or make_pairs(case)

    @jax.jit
    def find(image, text):
        rows, columns = number_pairs(*arrange(image, text, pairs), negatives, KEY)
        cosine = image @ text.T
        if ring is None:
            rows, columns = mine(rows, columns, cosine, negatives, rules)
        else:
            image, texts, sides = split(ring, rows, columns)
            found, (matched, *_) = mine_on_ring(
                ring, image, texts, sides, negatives, rules, None, True
            )
            extra = len(text) - len(image)
            padded = {k: jnp.pad(v, (0, extra)) for k, v in matched.mined.items()}
            rows = dataclasses.replace(rows, mined=found.mined)
            columns = dataclasses.replace(columns, mined={**padded, **columns.mined})
        masks = tile_masks(rows, columns, cosine, rules)
        return masks.row_negative, masks.column_negative

    return map(np.asarray, find(jnp.float32(case.image), jnp.float32(case.text)))


def chosen(cosine, negative, draw, negatives):
    """The oracle [R, C]: per row the hardest, and of the others those with the highest draws."""
    keep = np.zeros_like(negative)
    for i in range(len(cosine)):
        hardest = np.argsort(-np.where(negative[i], cosine[i], -np.inf))[: negatives.hard]
        keep[i, hardest] = True
        others = np.where(negative[i] & ~keep[i], draw[i].astype(np.float64), -np.inf)
        keep[i, np.argsort(-others)[: negatives.random]] = True
    return keep & negative


def oracle_masks(case, negatives):
    _, negative = oracle.roles(case)
    cosine, b = case.image @ case.text.T, len(case.image)
    draw = np.zeros(cosine.shape)
    if negatives.random:
        rows, columns = arrange(jnp.float32(case.image), jnp.float32(case.text), None)
        rows, columns = number_pairs(rows, columns, negatives, KEY)
        draw = np.asarray(draws(rows.mined["code"], columns.mined["code"]))
    row = chosen(cosine, negative, draw, negatives)
    column = np.zeros_like(row)
    column[:, :b] = chosen(cosine[:, :b].T, negative[:, :b].T, draw[:, :b].T, negatives).T
    return row, column


MIXES = [HardNegatives(3), HardNegatives(8, 0.5), HardNegatives(4, 1.0)]


@pytest.mark.parametrize("negatives", MIXES, ids=str)
def test_the_mined_set_is_the_oracles_whatever_the_tile_and_the_devices(negatives):
    case = oracle.batch()
    row, column = oracle_masks(case, negatives)
    assert row.sum(1).max() == min(negatives.k, oracle.roles(case)[1].sum(1).max())
    rings = [None, Ring(5, mesh=mesh(4))]
    if negatives == MIXES[1]:
        rings += [Ring(7), Ring(2, mesh=mesh(8), bidirectional=True)]
    for ring in rings:
        found_row, found_column = mined_masks(case, negatives, ring)
        np.testing.assert_array_equal(found_row, row)
        np.testing.assert_array_equal(found_column[:, : len(row)], column[:, : len(row)])


@pytest.mark.parametrize("ring", [None, Ring(5, mesh=mesh(4))])
def test_loss_and_gradients_on_the_mined_negatives_equal_the_oracle(ring):
    case, negatives = oracle.batch(), HardNegatives(8, 0.5)
    ramp = np.linspace(0.5, 2.0, len(case.image))
    positive, _ = oracle.roles(case)
    row, column = oracle_masks(case, negatives)
    options = {"pairs": make_pairs(case), "negatives": negatives, "rng": KEY}
    if ring is None:
        forms = [sigmoid_contrastive_loss, softmax_contrastive_loss]
    else:
        options["ring"] = ring
        sigmoid = functools.partial(sigmoid_contrastive_loss_sharded, any_cotangent=True)
        forms = [sigmoid, softmax_contrastive_loss_sharded]
    truths = [
        oracle.sigmoid_oracle(case, ramp, positive, row),
        oracle.softmax_oracle(case, ramp, positive, row, column_negative=column),
    ]
    truths[1][1]["bias"] = 0.0
    for form, truth in zip(forms, truths, strict=True):
        found = value_and_gradients(lambda *a, f=form: f(*a, **options), case, ramp)
        assert distance(found, truth) < 1e-6


def loss_form(name, ring):
    """The dense loss where ring is None, otherwise the sharded one."""
    if ring is None:
        return {"sigmoid": sigmoid_contrastive_loss, "softmax": softmax_contrastive_loss}[name]
    if name == "softmax":
        return functools.partial(softmax_contrastive_loss_sharded, ring=ring)
    return functools.partial(sigmoid_contrastive_loss_sharded, ring=ring, any_cotangent=True)


def program(form, case):
    """The program of a loss and its gradients, as text."""
    arguments = [jnp.float32(x) for x in (case.image, case.text, case.scale, case.bias)]
    gradients = jax.grad(lambda *a: form(*a).sum(), argnums=(0, 1, 2, 3))
    return jax.jit(gradients).lower(*arguments).as_text()


@pytest.mark.parametrize("ring", RINGS, ids=DEVICES)
@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_no_limit_and_a_limit_of_all_texts_are_the_plain_loss(name, ring):
    case = oracle.batch()
    form = functools.partial(loss_form(name, ring), pairs=make_pairs(case), rng=KEY)
    plain = program(form, case)
    for negatives in (HardNegatives(0, 1.0), HardNegatives(39, 0.5), HardNegatives(1000, 0.0)):
        limited = functools.partial(form, negatives=negatives)
        assert program(limited, case) == plain, negatives
    assert program(functools.partial(form, negatives=HardNegatives(38)), case) != plain


@pytest.mark.parametrize("ring", RINGS, ids=DEVICES)
@pytest.mark.parametrize("name", ["sigmoid", "softmax"])
def test_a_limit_of_all_that_a_row_has_gives_the_plain_loss_and_its_gradients(name, ring):
    case = oracle.batch()
    ramp, pairs = np.linspace(0.5, 2.0, len(case.image)), make_pairs(case)
    plain = value_and_gradients(functools.partial(loss_form(name, None), pairs=pairs), case, ramp)
    # with the padding no row has more than 37
    options = {"pairs": pairs, "negatives": HardNegatives(37, 0.25), "rng": KEY}
    form = functools.partial(loss_form(name, ring), **options)
    assert distance(value_and_gradients(form, case, ramp), plain) < 1e-6


def test_a_limit_that_some_rows_cannot_fill_keeps_all_that_they_have():
    case = oracle.batch(b=24, m=24)  # every third text has one id: those rows have 15 negatives
    row, _ = mined_masks(case, HardNegatives(20, 0.5), Ring(5))
    np.testing.assert_array_equal(row.sum(1), np.minimum(oracle.roles(case)[1].sum(1), 20))
    assert len(set(row.sum(1))) > 2


def test_negatives_that_tie_with_the_hardest_are_all_kept():
    case, tied = oracle.batch(b=24, m=64, e=16, masks=False), np.arange(24, 54)
    text = case.text.copy()
    text[tied] = text[24]  # thirty times one text, the nearest of all images
    case = dataclasses.replace(case, image=oracle.unit(text[24] + 0.3 * case.image), text=text)
    negatives = HardNegatives(4, 0.5)
    rows, columns = arrange(jnp.float32(case.image), jnp.float32(text), None)
    rows, columns = number_pairs(rows, columns, negatives, KEY)
    draw = np.asarray(draws(rows.mined["code"], columns.mined["code"]), np.float64)
    np.fill_diagonal(draw, -np.inf)
    # four random numbers are remembered; those of the ties beyond the two hardest take places
    remembered = np.argsort(-draw, 1)[:, :4]
    random = np.minimum((~np.isin(remembered, tied)).sum(1), 2)
    assert len(set(random)) > 1
    for ring in (None, Ring(6)):
        row, _ = mined_masks(case, negatives, ring)
        assert row[:, tied].all()
        np.testing.assert_array_equal(row.sum(1), 30 + random)


def planted(twins=3, groups=16, e=48):
    """Texts: each image's own, its twins (near, of another id) and its duplicates (the same id)."""
    rng = np.random.default_rng(0)
    centre = oracle.unit(rng.normal(size=(groups, e)))

    def near(spread):
        return oracle.unit(centre + spread * rng.normal(size=centre.shape))

    matched = near(0.02)
    planted_twins = [near(0.06) for _ in range(twins)]
    duplicates = [near(0.01) for _ in range(2)]
    text = np.concatenate([matched, *planted_twins, *duplicates])
    text_id = np.concatenate([np.arange(groups * (1 + twins)), *[np.arange(groups)] * 2])
    return oracle.Case(centre, text, 20.0, -3.0), text_id.astype(np.int32)


def planted_roles(text_id, groups):
    """(twins, duplicates) [groups, M] bool, of the images of `planted`."""
    own = np.arange(len(text_id))[None, :] % groups == np.arange(groups)[:, None]
    number = np.arange(len(text_id)) // groups
    return own & (number >= 1) & (number <= 3), own & (number >= 4)


@pytest.mark.parametrize("ring", RINGS, ids=DEVICES)
def test_planted_twins_are_found_and_planted_duplicates_never_leak(ring):
    case, text_id = planted()
    twins, duplicates = planted_roles(text_id, groups=16)
    row, _ = mined_masks(case, HardNegatives(3), ring, pairs=Pairs(text_id=jnp.asarray(text_id)))
    assert row[twins].all() and not row[duplicates].any()
    np.testing.assert_array_equal(row, twins)


@pytest.mark.parametrize("ring", [RINGS[0], RINGS[3]], ids=DEVICES[::3])
def test_planted_duplicates_leak_without_ids_but_not_past_a_ceiling(ring):
    case, text_id = planted()
    twins, duplicates = planted_roles(text_id, groups=16)
    pairs = Pairs(text_id=jnp.asarray(text_id))
    unguarded, _ = mined_masks(case, HardNegatives(3), ring, PairRules("negative"), pairs)
    assert unguarded[duplicates].mean() > 0.9
    ceiling, _ = mined_masks(case, HardNegatives(3), ring, PairRules(ceiling=0.97), Pairs())
    assert ceiling[twins].all() and not ceiling[duplicates].any()


@pytest.mark.parametrize("ring", RINGS, ids=DEVICES)
@pytest.mark.parametrize("negatives", [HardNegatives(42, 1.0), HardNegatives(42, 39 / 42)], ids=str)
def test_no_draw_lets_a_planted_duplicate_through(ring, negatives):
    case, text_id = planted(groups=8)
    twins, duplicates = planted_roles(text_id, groups=8)
    pairs = Pairs(text_id=jnp.asarray(text_id))
    # an image has 48 texts less its own and two duplicates: 42 of 45 are drawn, or 3 mined and 39
    row, _ = mined_masks(case, negatives, ring, pairs=pairs)
    assert not row[duplicates].any()
    np.testing.assert_array_equal(row.sum(1), 42)
    assert row[twins].all() or not negatives.hard
    if ring is None:
        unguarded, _ = mined_masks(case, negatives, ring, PairRules("negative"), pairs)
        assert unguarded[duplicates].mean() > 0.5


@pytest.mark.parametrize("ring", RINGS, ids=DEVICES)
def test_planted_twins_are_found_from_the_texts_as_well(ring):
    texts, text_id = planted(groups=8)
    rng = np.random.default_rng(1)
    image = oracle.unit(texts.text + 0.01 * rng.normal(size=texts.text.shape))
    case = dataclasses.replace(texts, image=image)  # every text has an image of its own
    row, column = mined_masks(
        case, HardNegatives(3), ring, pairs=Pairs(text_id=jnp.asarray(text_id))
    )
    group = np.arange(len(text_id)) % 8
    other = (group[:, None] == group[None, :]) & (text_id[:, None] != text_id[None, :])
    three_twins = text_id < 8  # the first of a group and its duplicates
    for found in (row, column.T):
        np.testing.assert_array_equal(found[three_twins], other[three_twins])
        np.testing.assert_array_equal(found.sum(1), 3)
        assert not (found & ~other).any()


def test_random_negatives_change_with_the_key_alone():
    case, negatives = oracle.batch(), HardNegatives(6, 1.0)
    arguments = [jnp.float32(x) for x in (case.image, case.text, case.scale, case.bias)]
    loss = functools.partial(
        sigmoid_contrastive_loss, *arguments, pairs=make_pairs(case), negatives=negatives
    )
    np.testing.assert_array_equal(loss(rng=KEY), loss(rng=KEY))
    assert (np.asarray(loss(rng=KEY)) != np.asarray(loss(rng=jax.random.key(5)))).mean() > 0.9
    with pytest.raises(ValueError, match="random negatives need an rng"):
        loss()


def test_draws_are_uniform_and_independent_between_rows():
    case = oracle.batch(b=96, m=512, masks=False)
    rows, columns = arrange(jnp.float32(case.image), jnp.float32(case.text), None)
    rows, columns = number_pairs(rows, columns, HardNegatives(4, 1.0), KEY)
    draw = np.asarray(draws(rows.mined["code"], columns.mined["code"])) / 2**31
    assert abs(draw.mean()) < 0.01 and abs((draw**2).mean() - 1 / 3) < 0.01
    between = np.corrcoef(draw)[np.triu_indices(96, 1)]
    assert abs(between).max() < 0.25 and abs(between.std() * np.sqrt(512) - 1) < 0.1
