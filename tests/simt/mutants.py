"""Deliberately broken device code, and the test that shows each: the proof that these tests can fail.

A mutant replaces one piece of a file in csrc/cuda. The piece must be there exactly once: where a kernel changed, its
mutants are adapted here and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

WRONG = r"AssertionError: .* wrong, first at"


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str  # in csrc/cuda
    old: str
    new: str
    test: str  # passes without the mutant and fails with it
    shows: str  # a regular expression for what the failure must say
    only: str = "float32"  # its cases, for pytest -k
    # the unit of csrc/cuda that serves it, and that is compiled with the mutant; "launch" is the host's
    unit: str = "run_posterior_float"
    of: str = "simt/test_kernels.py"  # where the test is

    def fits(self, text: str) -> bool:
        return text.count(self.old) == 1

    def apply(self, text: str) -> str:
        if not self.fits(text):
            found = text.count(self.old)
            raise ValueError(
                f"mutant {self.name} is stale: {found} times in csrc/cuda/{self.file}, not once:\n{self.old}\n"
                "Adapt it in tests/simt/mutants.py to the code as it is now."
            )
        return text.replace(self.old, self.new)


MUTANTS = (
    Mutant(
        "no_barrier_before_reading_shared",
        "kernel.cuh",
        "if (threadIdx.x % kWarp == 0) shared[warp] = x;\n  __syncthreads();\n",
        "if (threadIdx.x % kWarp == 0) shared[warp] = x;\n",
        "test_sums_of_long_rows",
        WRONG,
    ),
    # it matters where one row follows another and has more partial sums than one warp adds
    Mutant(
        "no_barrier_before_writing_shared_again",
        "kernel.cuh",
        "x += shared[k];\n  }\n  __syncthreads();\n",
        "x += shared[k];\n  }\n",
        "test_sums_row_after_row",
        WRONG,
        only="float64",
        unit="run_posterior_double",
    ),
    Mutant(
        "no_barrier_before_reading_last",
        "kernel.cuh",
        "if (last) *counter = 0;\n  }\n  __syncthreads();\n",
        "if (last) *counter = 0;\n  }\n",
        "test_sums_of_long_rows",
        f"a barrier that some threads of the block or warp never reach|{WRONG}",
    ),
    Mutant(
        "reads_one_too_many",
        "pack.cuh",
        "if (at.holds(i)) chunk.item[i] = p[i];",
        "if (i >= at.lo && i <= at.hi) chunk.item[i] = p[i];",
        "test_boundaries",
        r"AddressSanitizer: heap-buffer-overflow[\s\S]*READ of size 4",
    ),
    Mutant(
        "writes_one_too_many",
        "pack.cuh",
        "if (at.holds(i)) p[i] = chunk.item[i];",
        "if (i >= at.lo && i <= at.hi) p[i] = chunk.item[i];",
        "test_boundaries",
        r"AddressSanitizer: heap-buffer-overflow[\s\S]*WRITE of size 4",
    ),
    Mutant(
        "leaves_the_last_element_unwritten",
        "pack.cuh",
        "if (at.holds(i)) p[i] = chunk.item[i];",
        "if (i >= at.lo && i + 1 < at.hi) p[i] = chunk.item[i];",
        "test_boundaries",
        rf"{WRONG} .*tensor\(nan",
    ),
    Mutant(
        "ignores_alignment",
        "run.cuh",
        "reinterpret_cast<uintptr_t>(op->data) % (size_of(op->dtype) * kPack<T>) == 0;",
        "op->data != nullptr;",
        "test_layouts",
        "runtime error: .* misaligned address",
        unit="launch",
    ),
    Mutant(
        "ignores_where_rows_begin",
        "kernel.cuh",
        "const Unit u{from < begin ? begin : from,",
        "const Unit u{from,",
        "test_sums_of_long_rows",
        WRONG,
    ),
    # with float sums the order does not show: double adds up a few floats without rounding
    Mutant(
        "adds_in_the_order_of_arrival",
        "kernel.cuh",
        "p.sum.partial[at.unit] = double(sum);",
        "static int64_t arrived = 0;\n    p.sum.partial[arrived++ % g.count] = double(sum);",
        "test_same_bits_in_any_order",
        "differs from run to run",
        only="float64",
        unit="run_posterior_double",
    ),
    Mutant(
        "reads_a_line_beyond_the_unit",
        "plain.cuh",
        "fetch(place(element < limit ? element : first))",
        "fetch(place(element))",
        "test_plain_posterior",
        # as far behind as a round of lines is long there may be the end of another buffer
        r"AddressSanitizer: (heap-buffer-overflow|heap-use-after-free|SEGV)[\s\S]*READ",
        unit="run_plain_float32",
    ),
    Mutant(
        "takes_a_view_for_contiguous",
        "plain.cuh",
        "product(at.row, op.skip) +",
        "",
        "test_plain_posterior",
        WRONG,
        unit="run_plain_float32",
    ),
    Mutant(
        "one_noise_for_both_halves_of_a_line",
        "plain.cuh",
        "normals(stream, at.element + k,",
        "normals(stream, at.element,",
        "test_plain_posterior",
        WRONG,
        only="bfloat16",
        unit="run_plain_bfloat16",
    ),
    Mutant(
        "leaves_lanes_of_a_site_out",
        "classes.cuh",
        "join_lanes(x, team.lanes(), f);",
        "join_lanes(x, team.lanes() / 2, f);",
        "test_classes",
        WRONG,
        unit="run_mixture_float",
    ),
    Mutant(
        "leaves_warps_of_a_site_out",
        "classes.cuh",
        "k < team.warps();",
        "k < team.warps() - 1;",
        "test_classes",
        WRONG,
        unit="run_mixture_float",
    ),
    Mutant(
        "finishes_the_first_rows_alone",
        "kernel.cuh",
        "const uint32_t row = blockIdx.x * kThreads;",
        "const uint32_t row = 0;",
        "test_many_rows",
        WRONG,
    ),
    Mutant(
        "adds_up_the_lanes_of_other_sites",
        "categorical.cuh",
        "if (team.slice() >= away) x += before;",
        "x += before;",
        "test_any_number_of_sites",
        r"assert tensor\(.*\) < 0.01",
        only="sites",
        unit="run_latents_float",
        of="test_categorical_kernel.py",
    ),
    Mutant(
        "brings_posteriors_before_all_have_read",
        "marginals.cuh",
        "const int64_t j = first + threadIdx.x;\n    __syncthreads();\n",
        "const int64_t j = first + threadIdx.x;\n",
        "test_terms_and_gradients",
        r"AssertionError: \(\d, ",
        only="kernels and 300 and mss",
        unit="run_latents_float",
        of="test_total_correlation.py",
    ),
)
