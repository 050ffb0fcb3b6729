// The choice of ISA at run time.
#pragma once

#include <string>
#include <vector>

#include "ops.h"

namespace fastbert {

/// The names this machine can run, best first: of amx, avx512_vnni, avx512, avx2_vnni, avx2 and
/// portable, which is always there. Each stands for a KernelTable and a LinearTable; those of the
/// first three, and of the next two, share the former.
std::vector<std::string> available_isas();

/// Makes kernels() and linear_kernels() those of `name`. Throws std::invalid_argument, naming what
/// is available, if this machine cannot run it. Not for use while an op runs.
void set_isa(const std::string& name);

}  // namespace fastbert
