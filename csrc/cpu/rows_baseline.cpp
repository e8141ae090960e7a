// The row loop for every processor of the architecture.
#include <omp.h>

#include "../common/objective.h"

#define HKDFAST_ISA baseline
#define HKDFAST_LANES 4
#include "rows.h"

const hkdfast::Loops hkdfast::baseline_loops = hkdfast::baseline::loops;
