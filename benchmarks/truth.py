"""How right clusters are, by brute force: the Jaccard similarity of every pair that could matter.

`Truth.pairs(t)` finds all pairs of documents with at least `t` of their shingles of five words in common, exactly: two
such sets share one of the rarest (1 - t) of either's shingles, so only documents that meet in those are compared
(prefix filtering: Bayardo, Ma and Srikant, Scaling up all pairs similarity search, 2007).
"""

from itertools import combinations

import numba as nb
import numpy as np
import pyarrow as pa

from curation import overlap

NGRAM = 5
RECALL_AT, VERIFY = 0.85, 0.8
MOST_PAIRS = 2_000_000  # of clusters, of which precision is counted


class Truth:
    """Documents by id, their shingles, and which pairs are similar."""

    def __init__(self, ids: list[str], texts: list[str]):
        self.index = {one: k for k, one in enumerate(ids)}
        array = pa.array(texts, pa.large_string())
        self._text = np.unique([h.hex() for h in overlap.text_hash(array)], return_inverse=True)[1]
        self.hashes, self.starts, self.ends = overlap.shingle_sets(array, NGRAM)

    def similarity(self, pairs: np.ndarray) -> np.ndarray:
        """Jaccard of each of int64[n, 2]; 1.0 for equal texts, which may be too short for shingles."""
        found = _similarity(self.hashes, self.starts, self.ends, pairs)
        found[self._text[pairs[:, 0]] == self._text[pairs[:, 1]]] = 1.0
        return found

    def pairs(self, least: float) -> tuple[np.ndarray, np.ndarray]:
        """(int64[n, 2], float[n] Jaccard) of all pairs with shingles and a Jaccard of at least `least`."""
        counts = self.ends - self.starts
        entries = np.concatenate([self.hashes[a:b] for a, b in zip(self.starts, self.ends, strict=True)])
        _, inverse, frequency = np.unique(entries, return_inverse=True, return_counts=True)
        rank = np.empty(len(frequency), np.int64)
        rank[np.argsort(frequency, kind="stable")] = np.arange(len(frequency))
        prefix = np.where(counts > 0, counts - np.ceil(least * counts - 1e-9).astype(np.int64) + 1, 0)
        shingle, document = _prefixes(rank[inverse], counts, prefix)
        order = np.argsort(shingle, kind="stable")
        keys = np.unique(_meetings(shingle[order], document[order], counts, least))
        found = np.stack(np.divmod(keys, len(counts)), axis=1)
        similarity = self.similarity(found)
        return found[similarity >= least], similarity[similarity >= least]


class Scores:
    """What each tool's clusters are measured by."""

    def __init__(self, truth: Truth):
        self._truth = truth
        self.similar, _ = truth.pairs(RECALL_AT)
        self._changed = truth._text[self.similar[:, 0]] != truth._text[self.similar[:, 1]]

    def of(self, removed: dict[str, str]) -> dict[str, float | int]:
        """`removed`: the kept document of each that was removed. Recall: similar pairs (of RECALL_AT) of which at least
        one is removed, and those that are in one cluster: a document that is similar to two kept ones follows one of
        them. Precision: at VERIFY, of removed and kept, and of all pairs in a cluster."""
        index = self._truth.index
        leader = np.arange(len(index))
        links = np.array([(index[one], index[kept]) for one, kept in removed.items() if one in index], np.int64)
        links = links.reshape(-1, 2)
        leader[links[:, 0]] = links[:, 1]
        gone = leader != np.arange(len(leader))
        together = leader[self.similar[:, 0]] == leader[self.similar[:, 1]]
        resolved = gone[self.similar[:, 0]] | gone[self.similar[:, 1]]
        inside = _inside(leader)
        return {
            "removed": len(links),
            "recall": _share(resolved),
            "recall_without_exact": _share(resolved[self._changed]),
            "recall_in_one_cluster": _share(together),
            "precision": _share(self._truth.similarity(links) >= VERIFY),
            "precision_in_clusters": _share(self._truth.similarity(inside) >= VERIFY),
            "largest_cluster": int(np.bincount(leader).max()),
        }


def _inside(leader: np.ndarray) -> np.ndarray:
    """Pairs of documents of one cluster, at most about MOST_PAIRS, evenly from large clusters."""
    order = np.argsort(leader, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(leader[order])) + 1)
    groups = [group for group in groups if len(group) > 1]
    most = 2 + int((2 * MOST_PAIRS / max(1, len(groups))) ** 0.5)
    cut = [group[:: -(-len(group) // most)] for group in groups]
    return np.array([pair for group in cut for pair in combinations(group.tolist(), 2)], np.int64).reshape(-1, 2)


def _share(flags: np.ndarray) -> float:
    return round(float(flags.mean()), 5) if len(flags) else 1.0


@nb.njit(cache=True)
def _similarity(hashes: np.ndarray, starts: np.ndarray, ends: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    found = np.empty(len(pairs))
    for k in range(len(pairs)):
        found[k] = overlap.sets_jaccard(hashes, starts, ends, pairs[k, 0], pairs[k, 1])
    return found


@nb.njit(cache=True)
def _prefixes(ranks: np.ndarray, counts: np.ndarray, prefix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(shingle, document) of the rarest `prefix` shingles of each document."""
    shingle, document = np.empty(prefix.sum(), np.int64), np.empty(prefix.sum(), np.int64)
    start = at = 0
    for doc in range(len(counts)):
        own = np.sort(ranks[start : start + counts[doc]])
        shingle[at : at + prefix[doc]] = own[: prefix[doc]]
        document[at : at + prefix[doc]] = doc
        start += counts[doc]
        at += prefix[doc]
    return shingle, document


@nb.njit(cache=True)
def _meetings(shingle: np.ndarray, document: np.ndarray, counts: np.ndarray, least: float) -> np.ndarray:
    """smaller * documents + larger of every two documents under one shingle whose sizes allow `least`."""
    found = nb.typed.List.empty_list(nb.int64)
    start = 0
    for end in range(1, len(shingle) + 1):
        if end < len(shingle) and shingle[end] == shingle[start]:
            continue
        for i in range(start, end):
            for j in range(i + 1, end):
                a, b = document[i], document[j]
                if min(counts[a], counts[b]) >= least * max(counts[a], counts[b]):
                    found.append(min(a, b) * len(counts) + max(a, b))
        start = end
    keys = np.empty(len(found), np.int64)
    for k in range(len(found)):
        keys[k] = found[k]
    return keys
