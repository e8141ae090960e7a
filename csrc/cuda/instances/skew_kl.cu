#include "../launch.h"

template bool hkdfast::launch_rows(const Task&, bool, generic::SkewKL, const PlanRequest&, int, void*);
