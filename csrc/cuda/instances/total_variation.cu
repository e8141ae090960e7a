#include "../launch.h"

template bool hkdfast::launch_rows(const Task&, bool, generic::TotalVariation, const PlanRequest&, int, void*);
