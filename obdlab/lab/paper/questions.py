"""The questions of the evaluation, each with its figure in the paper and the experiments that answer it here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from obdlab.errors import ObdlabError


class UnknownQuestionError(ObdlabError):
    """No question has this key."""


@dataclass(frozen=True, slots=True)
class Run:
    """An experiment: a declaration below ``experiments/``, and the keys that differ from it.

    An evaluation has not failed if it cannot run an ``optional`` one.
    """

    name: str
    declaration: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False


START = Run("start", "evaluation_start.toml")
FIO = Run("random_read", "fio.toml")
DU = Run("scan_du", "read_all.toml", {"workload": "du"})
TAR = Run("scan_tar", "read_all.toml", {"workload": "tar"})
BUILD = Run("build", "build.toml")
#: Needs Docker, whose installation changes the host.
LAZY_BUILD = Run("lazy_build", "lazy_build.toml", optional=True)
INDEX = Run("index", "index.toml")
DEPTH = Run("depth", "depth.toml")
CODEC = Run("codec", "codec.toml")
CONVERSION = Run("conversion", "conversion.toml")
MISSES = Run("misses", "misses.toml")
MEMORY = Run("memory", "memory.toml")
SWARM = Run("swarm", "swarm.toml")
FROM_PEERS = Run("swarm_from_peers", "swarm_from_peers.toml")
SCALE = Run("simulated_scale", "simulated_scale.toml")
HYPER = Run("simulated_hyper", "simulated_hyper.toml")
FAASNET = Run("simulated_faasnet", "simulated_faasnet.toml")
FUNCTIONS = Run("simulated_functions", "simulated_functions.toml")
CHURN = Run("simulated_churn", "simulated_churn.toml")
BURSTS = Run("simulated_bursts", "simulated_bursts.toml")


@dataclass(frozen=True, slots=True)
class Question:
    """A question. ``figure`` is the paper's, or ""; ``differs`` names the differences from the paper's set-up.

    ``shown`` selects the rows of the question's table: allowed values by column; empty selects all rows.
    """

    key: str
    title: str
    figure: str
    asks: str
    runs: tuple[Run, ...]
    differs: str
    shown: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


_NETWORK = (
    "Emulated: the link (token bucket and a delay bridge between network namespaces of this machine). Measured: all "
    "else, with a real registry, containerd and runc. The image is WordPress with its database, of Debian packages: "
    "not the paper's."
)
_CLOUD = " The cloud disk is emulated by the kernel's throttling of a real one (2,000 IOPS, 100 MB/s)."

_SIMULATED = (
    "Simulated, not measured: links, round trips, slow start and queues, by a model whose topologies are the "
    "agents'. The ledger says whether it was fitted to a swarm, and how wrong it was at more hosts than fitted it."
)

_SWARM = (
    "Emulated: hosts (network namespaces of this machine), their links (token buckets) and the start, which is "
    "replayed; agents, registry, connections and bytes are real. Links of figure 17 are slow, and the start's time "
    "is stretched as much, so that the processors suffice; each row says how busy they were."
)

QUESTIONS: tuple[Question, ...] = (
    Question(
        "cold_start",
        "How long does a container take that nothing is there for?",
        "Fig 14",
        "From before the pull until the program says that it is ready; caches of host and registry client empty.",
        (START,),
        _NETWORK + " CRFS and pseudo-Slacker are the paper's alone.",
        {"start": ("cold",)},
    ),
    Question(
        "warm_start",
        "What does the block device cost once everything is local?",
        "Fig 15",
        "A start with all data on the disk and the page cache dropped, on the disk as it is and on a slow one.",
        (START,),
        _NETWORK + _CLOUD + " thin LVM is the paper's alone.",
        {"start": ("dropped",)},
    ),
    Question(
        "trace_prefetch",
        "How much of the difference between cold and warm does prefetching remove?",
        "Fig 16",
        "Cold starts without help, with a replayed trace, and with a hot layer, beside the warm one.",
        (START,),
        _NETWORK + " The paper replays with fio at queue depth 32; hot layers are not in the paper.",
        {"start": ("cold", "warm"), "disk": ("native",), "arm": ("obdlab", "obdlab-prefetch", "obdlab-hot")},
    ),
    Question(
        "pull_time",
        "What is left of the pull?",
        "Fig 18",
        "The time that pulling takes, start by start.",
        (START,),
        _NETWORK + " The paper's are 100 production hosts that have the base layers; here it is one, without them.",
        {"start": ("cold",)},
    ),
    Question(
        "launch_shape",
        "Is the launch itself slower, or does it have a longer tail?",
        "Fig 19",
        "The time from create to ready of a cold start, its pull left out; beside it that of starts with all local.",
        (START,),
        _NETWORK + " The paper's axis has no unit: only the shape can be compared.",
        {"start": ("cold", "dropped"), "disk": ("native",)},
    ),
    Question(
        "random_read",
        "How fast is the device by itself?",
        "Fig 22",
        "Random reads of 8 KiB by queue depth, page cache filling, of a plain loop device and of obdlab's.",
        (FIO,),
        "Measured. The paper compares with LVM on a server's NVMe; here it is a loop device on this machine's disk.",
    ),
    Question(
        "scan_du",
        "How long does it take to look at every file?",
        "Fig 23",
        "du over the whole image in a container, everything local, page cache dropped.",
        (DU,),
        "Measured." + _CLOUD,
        {"start": ("dropped",)},
    ),
    Question(
        "scan_tar",
        "How long does it take to read every file?",
        "Fig 24",
        "tar of the whole image in a container, everything local, page cache dropped.",
        (TAR,),
        "Measured." + _CLOUD,
        {"start": ("dropped",)},
    ),
    Question(
        "image_build",
        "What does building a layer cost?",
        "Fig 25",
        "Writing files into a layer and changing the mode of those below; commit apart. And whole builds on a base "
        "in a registry, by docker and by obdlab image build: pull, build, push.",
        (BUILD, LAZY_BUILD),
        "Measured. Files are made up, in the paper's number and size; the quick mode has fewer. Whole builds are not "
        "in the paper: their sizes are a tenth of those in BuildKit's documentation. Emulated: their link.",
    ),
    Question(
        "index",
        "How large is the merged index, and how fast is it looked up?",
        "Fig 7",
        "Lookups in indexes of random segments, one at a time and in batches, on one core; segments of real images "
        "and of a stack of 205 layers.",
        (INDEX, CONVERSION, DEPTH),
        "Measured, in Python with numpy; the paper's is C++.",
    ),
    Question(
        "codec",
        "What does compression cost, and what does it save?",
        "",
        "ZFile by algorithm and block size: reading, writing, random reads, size.",
        (CODEC,),
        "Measured. Not in the paper.",
    ),
    Question(
        "conversion",
        "How long does conversion take, and how large is what comes out?",
        "",
        "Converting images of Debian packages from an OCI layout into one.",
        (CONVERSION,),
        "Measured. The paper gives sizes of one image, no times.",
    ),
    Question(
        "miss_latency",
        "What does a read that misses cost?",
        "",
        "Single reads of 4 KiB of an image in a registry that nothing has read before, by round-trip time.",
        (MISSES,),
        "Emulated: the delay. Measured: all else. Not in the paper.",
    ),
    Question(
        "memory",
        "What does a device cost in memory?",
        "",
        "Proportional set size of the device servers, by number of devices of one image.",
        (MEMORY,),
        "Measured. Not in the paper.",
    ),
    Question(
        "many_hosts",
        "How long do starts take on a thousand hosts and more, if hosts pass blocks on?",
        "Fig 20",
        "Starts of a recorded Redis: replayed on up to 32 emulated hosts by real agents (figures 14 and 17), and "
        "simulated with blocks scaled to 15 MB (20 and 21), with peers and without.",
        (SCALE, HYPER, SWARM, FROM_PEERS),
        _SWARM + " " + _SIMULATED + " The paper measured figures 17 and 20 on a cloud, and projected figure 21.",
    ),
    Question(
        "many_functions",
        "Which topology starts functions soonest, and how long does a burst of requests last?",
        "",
        "FaaSNet's figures 11 to 17: starts at once by topology, 2,500 functions, bursts of requests; hosts that "
        "leave meanwhile.",
        (FAASNET, FUNCTIONS, BURSTS, CHURN),
        _SIMULATED + " FaaSNet's images are not public: the reads are Redis's, in blocks of the size of its shares.",
    ),
)


def question(key: str) -> Question:
    """Return one question. Raises UnknownQuestionError."""
    for found in QUESTIONS:
        if found.key == key:
            return found
    known = ", ".join(each.key for each in QUESTIONS)
    raise UnknownQuestionError(f"no such question (got {key!r}, wanted one of {known})")


def runs() -> tuple[Run, ...]:
    """Return every experiment once, in the order of the questions."""
    found: dict[str, Run] = {}
    for each in QUESTIONS:
        for run in each.runs:
            found.setdefault(run.name, run)
    return tuple(found.values())
