"""Weights with adapters: LoRA, LoHa, LoKr, (IA)^3, full differences, and DoRA on top of these.

Weights are those of PyTorch: [out, in] of a linear layer, [out, in, rows, columns] of a convolution. Formulas:
LoRA (Hu et al. 2022), LoHa (Hyeon-Woo et al. 2022, FedPara), LoKr and the Tucker forms of convolutions (LyCORIS, Yeh et
al. 2024), DoRA (Liu et al. 2024), (IA)^3 (Liu et al. 2022).
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Parts = Mapping[str, np.ndarray]
Shape = tuple[int, ...]


class Form(NamedTuple):
  """One kind of adapter.

  groups  alternatives of arrays, of each of which one has to be there, whole
  rank    the inner dimension that alpha is divided by; None for a kind, or a choice of its arrays, without one
  delta   the difference at alpha / rank = 1, as a function of the arrays and of the weight
  """

  groups: tuple[tuple[tuple[str, ...], ...], ...]
  rank: Callable[[Parts], int | None]
  delta: Callable[[Parts, np.ndarray], np.ndarray]

  @property
  def names(self) -> frozenset[str]:
    """All arrays that this kind may have."""
    return frozenset(name for group in self.groups for choice in group for name in choice)


def _matrix(x: np.ndarray) -> np.ndarray:
  return x.reshape(x.shape[0], -1)


def _product(up: np.ndarray, down: np.ndarray) -> np.ndarray:
  """[out, r] and [r, in, ...] -> [out, in, ...]."""
  if _matrix(up).shape[1] != down.shape[0]:
    raise ValueError(f'{up.shape} and {down.shape} have no rank in common')
  return (_matrix(up) @ _matrix(down)).reshape(up.shape[0], *down.shape[1:])


def _tucker(core: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
  """A core [r, r, rows, columns] between [r, out] and [r, in] -> [out, in, rows, columns]."""
  return np.einsum('ijkl,io,jn->onkl', core, up, down, optimize=True)


def _lora(parts: Parts, weight: np.ndarray) -> np.ndarray:
  del weight
  if 'mid' in parts:
    return _tucker(parts['mid'], _matrix(parts['up']).T, _matrix(parts['down']))
  return _product(parts['up'], parts['down'])


def _embedding(parts: Parts, weight: np.ndarray) -> np.ndarray:
  del weight
  return _product(parts['embedding_up'], parts['embedding_down']).T


def _loha(parts: Parts, weight: np.ndarray) -> np.ndarray:
  del weight
  first, second = (
    _tucker(parts[f'hada_t{n}'], parts[f'hada_w{n}_a'], parts[f'hada_w{n}_b'])
    if f'hada_t{n}' in parts
    else _product(parts[f'hada_w{n}_a'], parts[f'hada_w{n}_b'])
    for n in (1, 2)
  )
  return first * second


def _lokr(parts: Parts, weight: np.ndarray) -> np.ndarray:
  del weight
  first, second = (parts.get(f'lokr_w{n}') for n in (1, 2))
  if first is None:
    first = _product(parts['lokr_w1_a'], parts['lokr_w1_b'])
  if 'lokr_t2' in parts:
    second = _tucker(parts['lokr_t2'], parts['lokr_w2_a'], parts['lokr_w2_b'])
  elif second is None:
    second = _product(parts['lokr_w2_a'], parts['lokr_w2_b'])
  # Without its pixels, a factor of a convolution is [out, in * rows * columns], and so is the product.
  return np.kron(first.reshape(*first.shape, *(1,) * (second.ndim - first.ndim)), second)


def _of_lokr(parts: Parts) -> int | None:
  down = parts.get('lokr_w2_b', parts.get('lokr_w1_b'))  # two full factors have no rank: their scale is 1
  return None if down is None else down.shape[0]


def _ia3(parts: Parts, weight: np.ndarray) -> np.ndarray:
  factors = parts['ia3_l']  # [1, in] or [out, 1]
  if weight.ndim != 2 or factors.shape not in ((1, weight.shape[1]), (weight.shape[0], 1)):
    raise ValueError(f'has factors of {factors.shape} for a weight of {weight.shape}')
  return weight * (factors - 1)


def _ia3_of_lycoris(parts: Parts, weight: np.ndarray) -> np.ndarray:
  axis = int(parts['on_input'].item() != 0)
  factors = parts['ia3_weight']
  if factors.size != weight.shape[axis]:
    raise ValueError(f'has factors of {factors.shape} for axis {axis} of a weight of {weight.shape}')
  return weight * factors.reshape(*(1,) * axis, -1, *(1,) * (weight.ndim - axis - 1))


def _hada(tucker: bool) -> tuple[str, ...]:
  arrays = tuple(f'hada_w{n}_{side}' for n in (1, 2) for side in 'ab')
  return (*arrays, 'hada_t1', 'hada_t2') if tucker else arrays


NORMS = ('dora', 'magnitude')  # of DoRA, next to the arrays of LoRA, LoHa or LoKr

FORMS: dict[str, Form] = {
  'LoRA': Form(((('up', 'down', 'mid'), ('up', 'down')),), lambda parts: parts['down'].shape[0], _lora),
  'LoRA of an embedding': Form(
    ((('embedding_up', 'embedding_down'),),), lambda parts: parts['embedding_down'].shape[0], _embedding
  ),
  'LoHa': Form(((_hada(True), _hada(False)),), lambda parts: parts['hada_w1_b'].shape[0], _loha),
  'LoKr': Form(
    (
      (('lokr_w1',), ('lokr_w1_a', 'lokr_w1_b')),
      (('lokr_w2',), ('lokr_t2', 'lokr_w2_a', 'lokr_w2_b'), ('lokr_w2_a', 'lokr_w2_b')),
    ),
    _of_lokr,
    _lokr,
  ),
  '(IA)^3': Form(((('ia3_l',),),), lambda parts: None, _ia3),
  "LyCORIS's (IA)^3": Form(((('ia3_weight', 'on_input'),),), lambda parts: None, _ia3_of_lycoris),
  'a full difference': Form(((('diff',),),), lambda parts: None, lambda parts, weight: parts['diff']),
}


def form_of(names: frozenset[str]) -> tuple[str, Form]:
  """The kind of adapter that these arrays, and no others, are of; ValueError that says what is missing or too much."""
  kinds = [kind for kind, form in FORMS.items() if names & form.names]
  if len(kinds) != 1:
    raise ValueError(f'is {" and ".join(kinds)} at once' if kinds else 'has no weights')
  form = FORMS[kinds[0]]
  chosen: frozenset[str] = frozenset()
  for group in form.groups:
    whole = [choice for choice in group if names >= set(choice)]
    if not whole:
      nearest = max(group, key=lambda choice: len(names & set(choice)))
      raise ValueError(f'has no {next(name for name in nearest if name not in names)}')
    chosen |= set(whole[0])
  if extra := sorted(names - chosen):
    raise ValueError(f'has {extra[0]} next to {", ".join(sorted(chosen))}')
  return kinds[0], form


def changed(weight: np.ndarray, parts: Parts, scaling: float, strength: float) -> np.ndarray:
  """The weight with an adapter: weight + strength * scaling * difference; ValueError for arrays that do not fit it.

  With DoRA `strength` goes in a straight line from the weight to the decomposed one.

  parts     arrays of one of FORMS, and of DoRA 'dora' ([out, 1], or [1, in]) or 'magnitude' ([out])
  scaling   alpha / rank, or what the file has instead
  strength  that of the user, 1 for the adapter as it was trained
  """
  norms = {name: x for name, x in parts.items() if name in NORMS}
  _, form = form_of(frozenset(parts.keys() - norms.keys()))
  delta = _fitted(form.delta(parts, weight), weight.shape) * scaling
  for name, magnitude in norms.items():
    axis = int(name == 'dora' and magnitude.ndim > 1 and magnitude.shape[0] != weight.shape[0])
    delta = _decomposed(weight + delta, magnitude, axis) - weight
  return weight + strength * delta


def _fitted(delta: np.ndarray, shape: Shape) -> np.ndarray:
  """The difference in the shape of the weight; ValueError unless only axes of one pixel, or pixels in one axis with
  the inputs, tell them apart."""
  if _trimmed(delta.shape) != _trimmed(shape) and delta.shape != (shape[0], int(np.prod(shape[1:]))):
    raise ValueError(f'adapts a weight of {delta.shape}, but it is {shape}')
  return delta.reshape(shape)


def _trimmed(shape: Shape) -> Shape:
  while len(shape) > 1 and shape[-1] == 1:
    shape = shape[:-1]
  return shape


def _decomposed(weight: np.ndarray, magnitude: np.ndarray, axis: int) -> np.ndarray:
  """DoRA: the weight with its norms along all axes but one, 0 of outputs or 1 of inputs, replaced by `magnitude`."""
  others = tuple(n for n in range(weight.ndim) if n != axis)
  norm = np.sqrt(np.square(weight).sum(axis=others, keepdims=True))
  if magnitude.size != weight.shape[axis]:
    raise ValueError(f'has {magnitude.size} magnitudes for a weight of {weight.shape}')
  return weight * (magnitude.reshape(norm.shape) / np.maximum(norm, np.finfo(weight.dtype).eps))
