// Compiled once for each instruction set, with STEM_ISA and STEM_LANES given on the command line.
#include "stem/cpu/attention.h"
#include "stem/cpu/em.h"
#include "stem/cpu/nearest.h"
#include "stem/cpu/partial.h"
#include "stem/cpu/projected.h"
#include "stem/cpu/window.h"

#define STEM_TEXT_OF(x) #x
#define STEM_TEXT(x) STEM_TEXT_OF(x)

namespace stem::cpu::STEM_ISA {

extern const Kernels kKernels;
const Kernels kKernels = {
    STEM_TEXT(STEM_ISA), kPanel, kTile,
    em_scratch, em_pass, load_panel, store_panel, directions, add_parts, update,
    attention_scratch, attention, blended_attention,
    num_blocks, pack_weight, pack_bases, projected_tokens, projected_scratch, projected_attention,
    partial_scratch, partial_attention,
    place_tokens, window_scratch, window_attention,
    pack_keys, nearest_scratch, nearest,
};

}  // namespace stem::cpu::STEM_ISA
