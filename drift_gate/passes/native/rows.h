/* All that depends on the instruction set, in the names that NAME gives. */

#include "arithmetic.h"
#include "tiles.h"
#include "scan.h"
#include "select.h"
#include "expand.h"
#include "divergence.h"
#include "topk.h"
#include "words.h"
