// The choice of ISA at run time.
#pragma once

#include <string>
#include <vector>

#include "ops.h"

namespace fastbert {

/// The names this machine can run, best first; the last is "portable".
std::vector<std::string> available_isas();

/// Makes kernels() that of `name`. Throws std::invalid_argument, naming what is available, if this
/// machine cannot run it. Not for use while an op runs.
void set_isa(const std::string& name);

}  // namespace fastbert
