"""``obdlab lab export|bundle|unbundle``: rows, workflows and bundles for others."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from obdlab.cli.jsonoutput import add_json_option, answer, print_json
from obdlab.command import command
from obdlab.errors import ObdlabError

if TYPE_CHECKING:
    import argparse

_SNAKEMAKE, _KUBERNETES = "snakemake", "kubernetes-job"


def declare_export(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Writes the raw rows of an experiment's results as CSV, JSON lines or Parquet, by the file's name. With "
        "--to, writes declared experiments as a workflow: a Snakefile, or Kubernetes jobs (JSON). Measures nothing."
    )
    parser.add_argument(
        "name", nargs="+", metavar="NAME FILE | DECLARATION", help="results and file; with --to, declarations"
    )
    parser.add_argument("--to", choices=[_SNAKEMAKE, _KUBERNETES], help="write a workflow to standard output, or -o")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="where the workflow goes")
    parser.add_argument("--quick", action="store_true", help="a workflow of the quick modes")
    parser.add_argument("--image", default="", help="container image with obdlab, for Kubernetes")
    parser.add_argument(
        "--claim", default="obdlab-results", help="volume claim of the results (default: obdlab-results)"
    )
    add_json_option(parser)
    add_results(parser)
    parser.set_defaults(run=export, bounded=False)


def declare_bundle(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Packs rows, environments, declarations, tables, pages and versions of experiments into one file. Needs no "
        "root; the same results give the same bytes."
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="names of results directories")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FILE.tar.gz")
    add_json_option(parser)
    add_results(parser)
    parser.set_defaults(run=bundle, bounded=False)


def declare_unbundle(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.description = (
        "Unpacks a bundle, checks every file's digest, and computes every table from the rows again; the status is 1 "
        "if one differs. Needs no root."
    )
    parser.add_argument("bundle", type=Path, metavar="FILE.tar.gz")
    parser.add_argument("directory", type=Path, help="new or empty")
    add_json_option(parser, "one JSON object an experiment")
    parser.set_defaults(run=unbundle, bounded=False)


def add_results(parser: argparse.ArgumentParser) -> None:
    """Declare the option that names the place of results."""
    parser.add_argument("--results", type=Path, help="where results are kept (default: results in the checkout)")


def export(args: argparse.Namespace) -> int:
    """Write rows to a file, or declarations as a workflow."""
    if args.to:
        return _workflow(args)
    if len(args.name) != 2:
        raise ObdlabError(f"wanted the name of results and a file (got {' '.join(args.name)!r}); workflows need --to")
    from obdlab.lab.run.rows import RowStore, write_rows

    name, file = args.name[0], Path(args.name[1])
    directory = _root(args) / name
    if not (directory / "rows.jsonl").is_file():
        raise ObdlabError(f"{directory}: holds no rows (see: {command('lab', 'list')})")
    count = write_rows(RowStore(directory).rows(), file)
    answer(args, {"file": str(file), "rows": count}, f"{file}: {count} rows")
    return 0


def _workflow(args: argparse.Namespace) -> int:
    from obdlab.lab.run.declaration import load
    from obdlab.lab.share.workflow import Work, kubernetes_jobs, snakefile
    from obdlab.lab.workbench import find

    works = []
    for given in args.name:
        path = find("experiments", Path(given))
        spec = load(path, quick=args.quick)
        named = spec.with_values(name=f"{spec.name}-quick") if args.quick else spec
        works.append(Work(named, Path(given), args.quick))
    if args.to == _SNAKEMAKE:
        text = snakefile(works)
    elif not args.image:
        raise ObdlabError("--image: missing (wanted a container image that holds obdlab and the declarations)")
    else:
        text = kubernetes_jobs(works, image=args.image, claim=args.claim)
    if args.output is None:
        print(text, end="")
        return 0
    args.output.write_text(text, encoding="utf-8")
    answer(args, {"file": str(args.output), "experiments": len(works)}, f"{args.output}: {len(works)} experiments")
    return 0


def bundle(args: argparse.Namespace) -> int:
    """Pack results."""
    from obdlab.lab.share.bundle import pack

    size = pack(_root(args), args.names, args.output)
    text = f"{args.output}: {len(args.names)} experiments, {size:,} bytes"
    answer(args, {"file": str(args.output), "experiments": args.names, "bytes": size}, text)
    return 0


def unbundle(args: argparse.Namespace) -> int:
    """Unpack and check a bundle; 1 if a table is not what its rows come to."""
    from obdlab.lab.share.bundle import unpack

    found = unpack(args.bundle, args.directory)
    for each in found:
        if args.json:
            print_json({"experiment": each.name, "rows": each.rows, "same": each.same})
        else:
            print(f"{each.name}: {each.rows} rows, table {'as stored' if each.same else 'DIFFERS from the rows'}")
    if not args.json:
        print(
            f"all digests hold; see: {command('lab', 'show', 'NAME', '--results', str(args.directory / 'results'))}"
        )
    return int(not all(each.same for each in found))


def _root(args: argparse.Namespace) -> Path:
    from obdlab.lab.workbench import default_results

    results: Path = args.results or default_results()
    return results.resolve()
