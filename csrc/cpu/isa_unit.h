// The body of a translation unit of one ISA: every kernel, compiled for it, in one table.
#pragma once

#include "adamw_step.h"
#include "add_layer_norm.h"
#include "attention.h"
#include "bias_gelu.h"
#include "cross_entropy.h"
#include "embed_layer_norm.h"
#include "engine_rows.h"
#include "few_rows.h"
#include "rows.h"
#include "squared_norm.h"

namespace fastbert::FASTBERT_ISA {

const KernelTable& kernel_table() {
  static const KernelTable table = {
      &attention_fwd,        &attention_bwd,        &bias_gelu_fwd,
      &bias_gelu_bwd,        &add_layer_norm_fwd,   &add_layer_norm_bwd,
      &embed_layer_norm_fwd, &embed_layer_norm_bwd, &cross_entropy_rows,
      &gather_rows,          &scatter_rows,         &squared_norm,
      &adamw_step,           &few_rows_product,     &sum_rows,
      &layer_norm_rows,      &attention_piece,
  };
  return table;
}

}  // namespace fastbert::FASTBERT_ISA
