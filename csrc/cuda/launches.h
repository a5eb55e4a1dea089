// Where run.cuh meets the kernels: each function picks one and launches it. Each is instantiated in a unit of its own,
// so that they compile side by side, and none again where only the host's side changes.
#pragma once

#include "cuda/list.cuh"

namespace vaefast {

// With arithmetic in T. A reconstruction's launch takes the posterior's blocks along.
template <class T>
void launch_posterior(const Launch& a, cudaStream_t stream);
template <class T>
void launch_list(const ListLaunch& a, int64_t blocks, cudaStream_t stream);
template <class T>
void launch_rescale(const Launch& a, cudaStream_t stream);
// Of the likelihood at `index` of the list Group.
template <class T, class Group>
void launch_reconstruction(int index, const Launch& a, cudaStream_t stream);
template <class T>
void launch_mixture(const Launch& a, cudaStream_t stream);
// The sums of a launch that left them for this one.
template <class T>
void launch_finish(const Launch& a, cudaStream_t stream);

// The plain path, of operands that hold S.
template <class S>
void launch_plain(const Launch& a, bool reconstruction, cudaStream_t stream);

}  // namespace vaefast
