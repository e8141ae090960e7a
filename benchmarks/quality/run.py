"""What hkdfast's systems do to the small models of the picture world.

python benchmarks/quality/run.py seed           one base, one seed: minutes on two CPU cores
python benchmarks/quality/run.py seed --full    every base, system and seed; continues where it was stopped
python benchmarks/quality/run.py hkd            one track, one chain, three systems: minutes
python benchmarks/quality/run.py hkd --full     both tracks, every chain and system; continues where it was stopped

What they use:

python benchmarks/quality/run.py questions 7 out/pope               POPE questions about new images
python benchmarks/quality/run.py track hallucination 7 out/track    a track of the challenge about new images
python benchmarks/quality/run.py bases 1 2 3                        train the bases of SEED
python benchmarks/quality/run.py chains 1 2 3                       train the chains of HKD4VLM
python benchmarks/quality/run.py export chains/seed1/S              write a stored model as an ordinary model folder
python benchmarks/quality/run.py cost                               measure a stage with fused and with eager losses
"""

import argparse
import shlex
import sys

import hkd.chains
import hkd.command
import hkd.cost
import hkd.export
import seed.bases
import seed.command
import world.questions
import world.tracks
from hkdfast.shell import terminable

COMMANDS = {
    "seed": seed.command,
    "hkd": hkd.command,
    "questions": world.questions,
    "track": world.tracks,
    "bases": seed.bases,
    "chains": hkd.chains,
    "export": hkd.export,
    "cost": hkd.cost,
}


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = module.__doc__.partition("\n")[0]
        command = commands.add_parser(name, help=summary, description=module.__doc__, formatter_class=raw)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args()
    try:
        with terminable():
            options.run(options)
    except KeyboardInterrupt:
        again = shlex.join([sys.executable, *sys.argv])
        print(f"\nstopped; what was finished is kept, and the same command goes on:\n{again}", file=sys.stderr)
        raise SystemExit(130) from None


if __name__ == "__main__":
    main()
