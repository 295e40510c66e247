"""What `make test` leaves to `make test-all`, and why.

A name is a file's, or that of a test in it. `make test` keeps what it takes to trust an
installation: each public function against the reference on every route of the machine (C, PyTorch,
the kernels through the emulator or on a GPU), error messages, signatures, autograd, torch.compile
and the pages of docs/. That is some 400 seconds of CPU time, of 1,100 in all.
"""

BEYOND = {
    # Kernels once more, or for devices that are not here.
    "test_interpreted.py": "the kernels a second time, in Triton's interpreter: four minutes",
    "test_compile.py": "the kernels compiled for five GPUs",
    "test_compile_divergence.py": "as test_compile.py",
    "test_kernels_rows.py": "row functions in the emulator: the losses on it go through them too",
    "test_kernels_fuzz.py": "what fuzzing found, in the emulator",
    "test_kernels_vocabulary.py": "large vocabularies in the emulator",
    # Random problems.
    "test_fuzz.py": "the fuzzer itself, and a run of it",
    # Many processes.
    "test_ranks.py": "two and four processes",
    "test_vocab_parallel.py": "two and four processes",
    "test_linear_sharded.py": "two processes",
    # Other projects, which an installation need not have.
    "test_trl.py": "inside TRL",
    "test_trl_options.py": "inside TRL",
    "test_verl.py": "inside verl",
    "test_verl_policy.py": "inside verl",
    "test_skyrl.py": "inside SkyRL",
    "test_ms_swift.py": "inside ms-swift",
    "test_hf_heads.py": "heads of many models of transformers",
    "test_examples.py": "the scripts of examples/, with models",
    # Programs around the package.
    "test_bench.py": "the benchmarks",
    "test_bench_command.py": "the benchmarks",
    "test_bench_host.py": "the benchmarks",
    "test_bench_report.py": "the benchmarks",
    "test_bench_runs.py": "the benchmarks",
    "test_train_step.py": "the benchmarks",
    "test_distill.py": "drift-gate distill",
    "test_distill_command.py": "drift-gate distill",
    "test_distill_intervals.py": "drift-gate distill",
    "test_distill_progress.py": "drift-gate distill",
    "test_drift_report.py": "drift-gate distill",
    "test_drift_study.py": "drift-gate distill",
    "test_study_plan.py": "drift-gate distill",
    # Tests of the tests.
    "test_support.py": "the emulator and the judges",
    "test_mutants.py": "the sweep of planted faults",
    "test_opcheck.py": "every op of torch.library under opcheck: test_tracing.py compiles them",
    # Builds and other interpreters.
    "test_without_compiler.py": "the losses once more, without C",
    "test_docs.py::test_a_new_estimator": "compiles the C again",
    "test_packaging.py": "imports of every module in new processes",
    "test_recording.py::test_the_command": "replays under the profiler",
}
