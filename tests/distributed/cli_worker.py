"""`entrocraft` under DeepSpeed without its compiler run; says what it was launched as."""

from launching import start_worker


start_worker()

import sys  # noqa: E402

from accelerate.state import AcceleratorState  # noqa: E402

from entrocraft_trl.cli import main  # noqa: E402


if __name__ == "__main__":
    code = main(sys.argv[1:])
    state = AcceleratorState()
    stage = state.deepspeed_plugin.zero_stage if state.deepspeed_plugin is not None else 0
    print(f"launched as {state.num_processes} processes, ZeRO stage {stage}")
    sys.exit(code)
