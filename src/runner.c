/*-------------------------------------------------------------------------
 *
 * runner.c
 *	  The step runner.
 *
 * Only this file begins and ends transactions, waits for locks, pauses, and
 * writes the step log; a step only does its work.  One step runs like this:
 *
 *	take the runner's lock (session level, no waiting)	   -> or 55006
 *	log "running", commit
 *	repeat
 *		rest as long as throttle.c has a reason
 *		transaction:  bound all waits, load the state row, call the step,
 *					  save the state row and the sums of the log row,
 *					  note the locks, choose synchronous_commit
 *		commit, add up the holds, let the step say what it has done
 *	until the step is done
 *	log the locks, commit
 *
 * The work of a transaction is done in a subtransaction with its own SPI
 * connection, so that an error in it, wherever it comes from, leaves the
 * procedure able to go on: roll everything back, and then either try again
 * (a lock that was not to be had in time, a step that knows what to do), or
 * record what failed and raise it.
 *
 * Which transactions may be open beside one of ours does not matter here: we
 * are READ COMMITTED and take our snapshot after our lock.  Between two of
 * our transactions we hold neither a lock nor a snapshot.
 *
 * What rm_pause() and rm_cancel() want is seen when the state row is loaded,
 * and when something wakes a rest or interrupts a wait; steer.c obeys.
 *
 * Easy to get wrong: a transaction that holds a lock which blocks others
 * must wait in its commit neither for a standby, for that would be a wait without
 * bound, nor for the disk; it commits with synchronous_commit = off, its WAL is
 * flushed when the locks are gone, before anything else is done, and the next
 * transaction (the log's) waits for standbys in its stead.  And statement_timeout would count the whole
 * CALL, so it is switched off for it.
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/pg_type.h"
#include "common/pg_prng.h"
#include "compat.h"
#include "crew.h"
#include "executor/instrument.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "migration.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "portability/instr_time.h"
#include "postmaster/interrupt.h"
#include "risky_migrations.h"
#include "state.h"
#include "steer.h"
#include "storage/latch.h"
#include "throttle.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/fmgrprotos.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/resowner.h"
#include "utils/snapmgr.h"
#include "utils/timeout.h"
#include "utils/timestamp.h"
#include "worker.h"

/* first pause after a lock was not to be had, in milliseconds; then it doubles */
#define FIRST_RETRY_DELAY 50

/*
 * Rest after a lock that blocked others, in milliseconds: those who stood behind it
 * have the processors first.  They plan their statements anew.
 */
#define LET_THROUGH 50

/* until when no work begins for it */
static TimestampTz let_through_until = 0;

/* the transaction that has just begun is READ COMMITTED, READ WRITE */
static void
begin_transaction(void)
{
	XactIsoLevel = XACT_READ_COMMITTED;
	XactReadOnly = false;
	XactDeferrable = false;
}

/* commits and begins the next transaction; outside of rm_try() only */
void
rm_commit(void)
{
	SPI_commit();
	begin_transaction();
}

static void
roll_back(void)
{
	SPI_rollback();
	begin_transaction();
}

/*
 * Every procedure calls this first.  It refuses to run where it could not
 * commit (2D000) or not write (25006), connects to SPI and leaves the
 * transaction in which CALL was analyzed.
 */
void
rm_procedure_begin(FunctionCallInfo fcinfo, const char *name)
{
	if (fcinfo->context == NULL || !IsA(fcinfo->context, CallContext) ||
		castNode(CallContext, fcinfo->context)->atomic)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_TRANSACTION_TERMINATION),
				 errmsg("%s() cannot run inside a transaction block or a function", name),
				 errdetail("It commits after each of its steps and batches."),
				 errhint("CALL it as a statement of its own, outside of BEGIN ... COMMIT.")));
	if (RecoveryInProgress())
		ereport(ERROR,
				(errcode(ERRCODE_READ_ONLY_SQL_TRANSACTION),
				 errmsg("%s() cannot run during recovery", name),
				 errdetail("Its transactions write, and a standby takes no writes."),
				 errhint("Run it on the primary server.")));
	if (XactReadOnly)
		ereport(ERROR,
				(errcode(ERRCODE_READ_ONLY_SQL_TRANSACTION),
				 errmsg("%s() cannot run in a read-only session", name),
				 errdetail("Its transactions write, and default_transaction_read_only is on."),
				 errhint("SET default_transaction_read_only = off.")));
	/* fails early where the extension was not created */
	(void) rm_state_relid("migration", false);

	SPI_connect_ext(SPI_OPT_NONATOMIC);
	if (get_timeout_active(STATEMENT_TIMEOUT))
		disable_timeout(STATEMENT_TIMEOUT, false);
	rm_commit();
}

void
rm_procedure_end(void)
{
	SPI_finish();
}

/* see rm_try_here(); keep: whether what it has done is to stay */
static ErrorData *
try_work(void (*work) (void *arg), void *arg, bool keep, MemoryContext cxt)
{
	MemoryContext oldcxt = CurrentMemoryContext;
	ResourceOwner oldowner = CurrentResourceOwner;
	ErrorData  *volatile error = NULL;

	BeginInternalSubTransaction(NULL);
	MemoryContextSwitchTo(oldcxt);
	PG_TRY();
	{
		work(arg);
		if (keep)
			ReleaseCurrentSubTransaction();
		else
			RollbackAndReleaseCurrentSubTransaction();
	}
	PG_CATCH();
	{
		MemoryContextSwitchTo(cxt);
		error = CopyErrorData();
		FlushErrorState();
		RollbackAndReleaseCurrentSubTransaction();
	}
	PG_END_TRY();
	MemoryContextSwitchTo(oldcxt);
	CurrentResourceOwner = oldowner;
	return error;
}

typedef struct Connected
{
	void		(*work) (void *arg);
	void	   *arg;
} Connected;

static void
connected(void *arg)
{
	Connected  *c = arg;

	SPI_connect();
	c->work(c->arg);
	SPI_finish();
}

/*
 * Calls work(arg) in a subtransaction, with the SPI connection of the caller, if any.
 * Returns NULL, or, after it has been rolled back, the error (in cxt).
 */
ErrorData *
rm_try_here(void (*work) (void *arg), void *arg, MemoryContext cxt)
{
	return try_work(work, arg, true, cxt);
}

/* the same with an SPI connection of its own */
ErrorData *
rm_try(void (*work) (void *arg), void *arg, MemoryContext cxt)
{
	Connected	c = {.work = work,.arg = arg};

	return try_work(connected, &c, true, cxt);
}

/*
 * Calls work(arg) likewise, and undoes it in any case: to see what would come
 * of it.
 */
ErrorData *
rm_rehearse(void (*work) (void *arg), void *arg, MemoryContext cxt)
{
	Connected	c = {.work = work,.arg = arg};

	return try_work(connected, &c, false, cxt);
}

/* one rest, to its end or until the latch is set */
typedef struct Rest
{
	int			ms;
	bool		woken;
} Rest;

static void
rest(void *arg)
{
	Rest	   *r = arg;

	CHECK_FOR_INTERRUPTS();
	r->woken = (WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						  r->ms, PG_WAIT_EXTENSION) & WL_LATCH_SET) != 0;
	ResetLatch(MyLatch);
	CHECK_FOR_INTERRUPTS();
}

/*
 * Rests between two transactions, holding neither lock nor snapshot, for so
 * many milliseconds or until the latch is set: then it returns true, and the
 * caller looks why.  If it is interrupted, *error (in cxt) says by what.
 */
bool
rm_wait_latch(int ms, MemoryContext cxt, ErrorData **error)
{
	Rest		r = {.ms = ms};

	InvalidateCatalogSnapshot();
	*error = rm_try(rest, &r, cxt);
	if (*error)
		roll_back();
	return r.woken;
}

/*
 * Rests that long, whatever wakes it meanwhile, unless something else is wanted
 * of the run (which may be NULL), it waits for its helpers, or, if asked, the
 * configuration is to be reloaded.  Returns the error that interrupted it.
 */
static ErrorData *
rest_out(RmRun *run, int ms, bool until_reload, MemoryContext cxt)
{
	TimestampTz until = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), ms);
	ErrorData  *error = NULL;

	while (ms > 0 && error == NULL && !(until_reload && ConfigReloadPending))
	{
		if (rm_wait_latch(ms, cxt, &error) && error == NULL && run &&
			(run->wait_for_helpers || rm_steer_wanted(run) != RM_WANT_RUN))
			break;
		ms = (int) TimestampDifferenceMilliseconds(GetCurrentTimestamp(), until);
	}
	return error;
}

static bool
is_lock_failure(ErrorData *error)
{
	return error->sqlerrcode == ERRCODE_LOCK_NOT_AVAILABLE ||
		error->sqlerrcode == ERRCODE_T_R_DEADLOCK_DETECTED;
}

/* growing and jittered, so that tries of several sessions do not meet again */
static int
retry_delay(int tries)
{
	double		ms = FIRST_RETRY_DELAY * (double) (1 << Min(tries, 20));

	ms = Min(ms, (double) rm_lock_retry_max_delay);
	return Max(1, (int) (ms * (0.5 + 0.5 * pg_prng_double(&pg_global_prng_state))));
}

/*
 * work(arg) in a transaction of its own, with waits bounded: a lock that is
 * not to be had is tried again as in a step.  Other errors, and that one in
 * the end, are raised after rollback.
 */
void
rm_transaction(void (*work) (void *arg), void *arg)
{
	MemoryContext cxt = CurrentMemoryContext;
	ErrorData  *error;

	for (int tries = 0;; tries++)
	{

		rm_lock_bound_waits();
		error = rm_try(work, arg, cxt);
		if (error == NULL)
			break;
		roll_back();
		if (!is_lock_failure(error))
			ReThrowError(error);
		if (tries >= rm_lock_retries)
		{
			error->detail = psprintf("It was not to be had in %d tries of at most %d ms.",
									 tries + 1, rm_lock_timeout);
			error->hint = "See rm_blocked_queries(), end the transaction that holds the lock, then call it again; or raise risky_migrations.lock_retries.";
			ReThrowError(error);
		}
		error = rest_out(NULL, retry_delay(tries), false, cxt);
		if (error)
			ReThrowError(error);
	}
	rm_commit();
}

/*
 * Runs SQL of ours on the user's objects, as the current role.  All names in
 * it are qualified; search_path is pinned, and where no tablespace is named the
 * database's is meant.  Needs SPI.
 */
void
rm_execute(const char *sql)
{
	int			save_nestlevel = NewGUCNestLevel();
	int			rc;

	(void) set_config_option("search_path", "pg_catalog, pg_temp", PGC_USERSET,
							 PGC_S_SESSION, GUC_ACTION_SAVE, true, 0, false);
	(void) set_config_option("default_tablespace", "", PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_SAVE, true, 0, false);
	/* what it says to us is not for the user */
	if (client_min_messages < WARNING)
		(void) set_config_option("client_min_messages", "warning", PGC_USERSET,
								 PGC_S_SESSION, GUC_ACTION_SAVE, true, 0, false);
	rc = SPI_execute(sql, false, 0);
	AtEOXact_GUC(false, save_nestlevel);
	if (rc < 0)
		elog(ERROR, "SPI returned %s for: %s", SPI_result_code_string(rc), sql);
}

double
rm_elapsed_ms(instr_time since)
{
	instr_time	now;

	INSTR_TIME_SET_CURRENT(now);
	INSTR_TIME_SUBTRACT(now, since);
	return INSTR_TIME_GET_MILLISEC(now);
}

/* may a notice be sent?  At most one a second, and the first at once */
bool
rm_notice_due(RmRun *run)
{
	TimestampTz now = GetCurrentTimestamp();

	if (run->last_notice != 0 &&
		!TimestampDifferenceExceeds(run->last_notice, now, 1000))
		return false;
	run->last_notice = now;
	return true;
}

/* so often others may undo what a step has looked at */
#define MAX_ROUNDS 20

/*
 * What others did has sent the step back to an earlier point of its work, and would do
 * so for ever if they went on.  Says why when somebody has to be asked (55000).
 */
void
rm_begin_again(RmRun *run, const char *why)
{
	if (++run->rounds < MAX_ROUNDS)
		return;
	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("step %s of migration %lld had to begin again %d times", run->step->name,
					(long long) run->migration_id, run->rounds),
			 errdetail("%s", why),
			 run->revert ?
			 errhint("When nobody does that any more CALL rm_rollback(%lld) again; or stay with the new column: CALL rm_cleanup(%lld).",
					 (long long) run->migration_id, (long long) run->migration_id) :
			 errhint("When nobody does that any more call it again (next_call in rm_migrations), what is done stays; or take everything back with CALL rm_rollback(%lld).",
					 (long long) run->migration_id)));
}

/*-------------------------------------------------------------------------
 * The step log
 *-------------------------------------------------------------------------
 */

/* whatever this migration left as running was interrupted: we hold its lock */
static void
log_begin(void *arg)
{
	RmRun	   *run = arg;
	Oid			types[] = {INT8OID, TEXTOID, TEXTOID, TEXTOID, OIDOID, OIDOID, TEXTOID};
	Datum		v[7];
	char		n[7];

	memset(n, ' ', sizeof(n));
	v[0] = Int64GetDatum(run->migration_id);
	n[0] = run->migration_id ? ' ' : 'n';
	if (run->migration_id)
		rm_state_execute("UPDATE risky_migrations.step_log SET state = 'interrupted'"
						 " WHERE migration_id = $1 AND state = 'running'",
						 1, types, v, NULL);
	v[1] = CStringGetTextDatum(run->approach);
	v[2] = CStringGetTextDatum(run->step->name);
	v[3] = CStringGetTextDatum(run->revert ? "rollback" : "apply");
	v[4] = ObjectIdGetDatum(GetUserId());
	v[5] = ObjectIdGetDatum(run->relid);
	v[6] = CStringGetTextDatum(run->relation);
	rm_state_execute("INSERT INTO risky_migrations.step_log"
					 " (migration_id, approach, step, direction, owner, relid, relation, state)"
					 " VALUES ($1, $2, $3, $4, $5, $6, $7, 'running') RETURNING id",
					 7, types, v, n);
	run->log_id = rm_result_int64(0, 1);
}

/* the fields of an RmProgress in their order, and workers, as the column progress */
static Datum
progress_array(const RmProgress *p, int workers)
{
	Datum		fields[] = {Int64GetDatum(p->blocks_first),
		Int64GetDatum(p->blocks_done), Int64GetDatum(p->blocks_total),
		Int64GetDatum(p->rows_first), Int64GetDatum(p->rows_done),
	Int64GetDatum(p->rows_total), Int64GetDatum(workers)};

	return rm_int64_array(fields, lengthof(fields));
}

/* writes the sums so far, in the transaction that they count */
static void
log_sums(RmRun *run, const char *state, ErrorData *error)
{
	Oid			types[] = {INT8OID, TEXTOID, FLOAT8OID, INT8OID, INT8OID, INT8OID,
		INT8OID, INT8OID, INT8OID, TEXTOID, TEXTOID, TEXTOID, TEXTOID, OIDOID,
	TEXTOID, TEXTOID, TEXTOID, INT8ARRAYOID};
	Datum		v[18];
	char		n[18];
	RmCrewSums	crew = rm_crew_sums(run);
	int			i = 0;

	memset(n, ' ', sizeof(n));
	v[i++] = Int64GetDatum(run->log_id);
	v[i++] = CStringGetTextDatum(state);
	v[i++] = Float8GetDatum(rm_elapsed_ms(run->started));
	v[i++] = Int64GetDatum(run->transactions + crew.transactions);
	v[i++] = Int64GetDatum(run->batches + crew.batches);
	v[i++] = Int64GetDatum(run->rows_changed + crew.rows_changed);
	v[i++] = Int64GetDatum(run->rows_hot + crew.rows_hot);
	v[i++] = Int64GetDatum(run->lock_retries + crew.lock_retries);
	v[i++] = Int64GetDatum((int64) (pgWalUsage.wal_bytes - run->wal_started) + crew.wal_bytes);
	for (int field = 0; field < 4; field++, i++)
	{
		const char *s = NULL;

		if (error)
			s = field == 0 ? unpack_sql_state(error->sqlerrcode) :
				field == 1 ? error->message :
				field == 2 ? error->detail : error->hint;
		n[i] = s ? ' ' : 'n';
		v[i] = s ? CStringGetTextDatum(s) : (Datum) 0;
	}
	v[i++] = ObjectIdGetDatum(run->relid);
	v[i++] = CStringGetTextDatum(run->relation);
	v[i++] = CStringGetTextDatum(run->wait_kind ? run->wait_kind : "");
	v[i++] = CStringGetTextDatum(run->wait_reason ? run->wait_reason : "");
	v[i++] = progress_array(&run->progress, rm_crew_size(run));
	rm_state_execute("UPDATE risky_migrations.step_log SET state = $2, duration_ms = $3,"
					 " transactions = $4, batches = $5, rows_changed = $6,"
					 " rows_hot = $7, lock_retries = $8, wal_bytes = $9,"
					 " sqlstate = $10, message = $11, detail = $12, hint = $13,"
					 " relid = $14, relation = $15, wait_kind = nullif($16, ''),"
					 " wait_reason = nullif($17, ''), wait_since = CASE"
					 " WHEN $16 = '' THEN NULL ELSE pg_catalog.clock_timestamp() END,"
					 " progress = $18, finished_at = CASE"
					 " WHEN $2 = 'running' THEN NULL ELSE pg_catalog.clock_timestamp() END"
					 " WHERE id = $1",
					 18, types, v, n);
}

/* what rm_show_wait() writes */
typedef struct Wait
{
	RmRun	   *run;
	const char *kind;
	const char *reason;
} Wait;

static void
log_wait(void *arg)
{
	Wait	   *wait = arg;
	Oid			types[] = {INT8OID, TEXTOID, TEXTOID, INT8OID};
	Datum		v[4];
	const char *n = wait->kind ? NULL : " nn ";

	v[0] = Int64GetDatum(wait->run->log_id);
	v[1] = wait->kind ? CStringGetTextDatum(wait->kind) : (Datum) 0;
	v[2] = wait->kind ? CStringGetTextDatum(wait->reason) : (Datum) 0;
	v[3] = Int64GetDatum(wait->run->lock_retries);
	/* nobody's work: to be seen, not to be kept */
	(void) set_config_option("synchronous_commit", "off", PGC_USERSET,
							 PGC_S_SESSION, GUC_ACTION_LOCAL, true, 0, false);
	rm_state_execute("UPDATE risky_migrations.step_log SET wait_kind = $2,"
					 " wait_reason = $3, wait_since = CASE WHEN $2 IS NULL THEN NULL"
					 " WHEN wait_kind = $2 THEN wait_since"
					 " ELSE pg_catalog.clock_timestamp() END, lock_retries = $4"
					 " WHERE id = $1",
					 4, types, v, n);
}

/*
 * What is known only after the commit: the locks' holds, the whole duration.
 * Helpers add theirs to the runner's, or it to theirs.
 */
static void
log_locks(void *arg)
{
	RmRun	   *run = arg;
	Oid			id_types[] = {INT8OID, FLOAT8OID};
	Datum		id_values[] = {Int64GetDatum(run->log_id), Float8GetDatum(run->duration_ms)};
	ListCell   *lc;

	if (run->helper == 0)
		rm_state_execute("UPDATE risky_migrations.step_log SET duration_ms = $2 WHERE id = $1",
						 2, id_types, id_values, NULL);
	foreach(lc, run->locks.stats)
	{
		RmLockStat *stat = lfirst(lc);
		Oid			types[] = {INT8OID, OIDOID, TEXTOID, TEXTOID, TEXTOID, BOOLOID,
		BOOLOID, FLOAT8OID, FLOAT8OID, BOOLOID, INT8OID, BOOLOID};
		Datum		v[12];
		char		n[12];

		if (stat->times == 0 || (stat->relation == NULL && OidIsValid(stat->relid)))
			continue;
		memset(n, ' ', sizeof(n));
		v[0] = Int64GetDatum(run->log_id);
		v[1] = ObjectIdGetDatum(stat->relid);
		v[2] = CStringGetTextDatum(stat->relation ? stat->relation : run->relation);
		v[3] = CStringGetTextDatum(stat->role);
		v[4] = CStringGetTextDatum(GetLockmodeName(DEFAULT_LOCKMETHOD, stat->mode));
		v[5] = BoolGetDatum(!stat->harmless && DoLockModesConflict(stat->mode, AccessShareLock));
		v[6] = BoolGetDatum(!stat->harmless && DoLockModesConflict(stat->mode, RowExclusiveLock));
		v[7] = Float8GetDatum(stat->wait_ms);
		n[7] = stat->wait_ms >= 0 ? ' ' : 'n';
		v[8] = Float8GetDatum(stat->hold_ms);
		v[9] = BoolGetDatum(!stat->bound);
		v[10] = Int64GetDatum(stat->times);
		v[11] = BoolGetDatum(stat->rewritten);
		rm_state_execute("INSERT INTO risky_migrations.step_lock AS l VALUES"
						 " ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12)"
						 " ON CONFLICT (step_id, relid, lock_mode) DO UPDATE SET"
						 " wait_ms = greatest(l.wait_ms, excluded.wait_ms),"
						 " hold_ms = greatest(l.hold_ms, excluded.hold_ms),"
						 " hold_is_exact = CASE WHEN excluded.hold_ms > l.hold_ms"
						 " THEN excluded.hold_is_exact ELSE l.hold_is_exact END,"
						 " times = l.times + excluded.times,"
						 " rewritten = l.rewritten OR excluded.rewritten",
						 12, types, v, n);
	}
}

/*-------------------------------------------------------------------------
 * One step
 *-------------------------------------------------------------------------
 */

/* what one transaction of a step hands back */
typedef struct Attempt
{
	RmRun	   *run;
	RmStepResult result;
	bool		steered;		/* nothing was done: something else is wanted */
	ErrorData  *error;			/* to be recorded */
} Attempt;

/* the state after a step is complete */
static void
advance_state(RmRun *run)
{
	RmMigration *m = run->m;

	m->phase = 0;
	m->steps_done = run->revert ? run->step_index : run->step_index + 1;
	if (run->revert && run->back_to > 0)
		m->steps_done = Min(m->steps_done, run->back_to);
	if (m->steps_done == 0)
		m->state = "rolled back";
	else if (m->steps_done == m->method->nsteps)
		m->state = "done";
	else
		m->state = "open";
}

/*
 * The images of whole pages, which are most of what a rewrite, a sort into an index
 * or the first change of each page since a checkpoint leaves in the WAL.  Not with
 * pglz: it costs more time than the WAL does.  Only superusers may set
 * wal_compression, since the size of an image tells something of what else is on the
 * page; here all of it is the table's, which is the caller's own.
 */
static void
compress_page_images(void)
{
#ifdef USE_LZ4
	if (rm_compress_wal && wal_compression == WAL_COMPRESSION_NONE)
		(void) set_config_option("wal_compression", "lz4", PGC_SUSET, PGC_S_SESSION,
								 GUC_ACTION_LOCAL, true, 0, false);
#endif
}

/*
 * How the transaction commits.  With a lock that blocks others it waits neither for
 * standbys nor for the disk: after_commit() does, when the locks are gone.  Work and
 * state are lost together or not at all; and whoever sees the work and commits
 * has a later place in the WAL.
 */
static void
choose_synchronous_commit(RmRun *run)
{
	if (run->locks.blocking || run->async_commit)
		(void) set_config_option("synchronous_commit", "off", PGC_USERSET,
								 PGC_S_SESSION, GUC_ACTION_LOCAL, true, 0, false);
}

/* 55000 if another session has taken the migration elsewhere meanwhile */
static void
check_step_applies(RmRun *run)
{
	RmMigration *m = run->m;

	if (run->revert ? m->steps_done >= run->step_index && strcmp(m->state, "rolled back") != 0 :
		m->steps_done == run->step_index && strcmp(m->state, "open") == 0)
		return;
	ereport(ERROR,
			(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
			 errmsg("migration %lld has been changed by another session meanwhile",
					(long long) m->id),
			 errdetail("It is %s, and %d of its steps are done.", m->state, m->steps_done),
			 errhint("SELECT * FROM rm_migrations says what to call next.")));
}

/* a transaction of a step, or of a helper, as it begins */
static void
begin_attempt(RmRun *run)
{
	rm_lock_bound_waits();
	rm_lock_account_begin(&run->locks);
	run->async_commit = false;
	run->pause_ms = 0;
	run->wait_for_helpers = false;
	run->old_storage = NIL;
	run->top_level = NULL;
	run->may_hold = run->batch_ended = false;
	run->wait_kind = run->wait_reason = NULL;
	if (run->step->writes_pages)
		compress_page_images();
}

/* one transaction of a step */
static void
attempt_step(void *arg)
{
	Attempt    *attempt = arg;
	RmRun	   *run = attempt->run;

	begin_attempt(run);
	if (run->migration_id)
	{
		run->m = rm_migration_load(run->migration_id, true, CurrentMemoryContext);
		check_step_applies(run);
		if (run->m->wanted != RM_WANT_RUN && !run->revert)
		{
			attempt->steered = true;
			return;
		}
	}

	attempt->result = (run->revert ? run->step->revert : run->step->apply) (run);

	run->transactions++;
	if (run->m)
	{
		if (attempt->result == RM_STEP_DONE)
			advance_state(run);
		rm_migration_save(run->m);
	}
	if (run->batch_ended && attempt->result == RM_STEP_AGAIN && run->wait_kind == NULL)
	{
		run->wait_reason = rm_batch_pause_reason(run);
		run->wait_kind = run->wait_reason ? "pause" : NULL;
	}
	log_sums(run, attempt->result == RM_STEP_AGAIN ? "running" : "done", NULL);
	rm_lock_account_collect(&run->locks, run->relid, run->old_storage);
	choose_synchronous_commit(run);
}

static void
record_failure(void *arg)
{
	Attempt    *attempt = arg;

	attempt->run->wait_kind = attempt->run->wait_reason = NULL;
	log_sums(attempt->run, "failed", attempt->error);
	log_locks(attempt->run);
}

/* the error to raise when a lock was not to be had in all the tries */
static void
explain_lock_failure(RmRun *run, ErrorData *error, int tries)
{
	MemoryContext oldcxt = MemoryContextSwitchTo(run->cxt);
	char	   *blockers = rm_lock_blockers(run->relid, AccessExclusiveLock);

	error->message = psprintf("step %s could not get its lock on %s in %d tries",
							  run->step->name, run->relation, tries);
	error->detail = blockers ? psprintf("On it %s.", blockers) :
		psprintf("Each try waited for at most %d ms.", rm_lock_timeout);
	error->hint = pstrdup("Nothing was changed by this step's last try. See rm_blocked_queries(), end the transaction that holds the lock, then call it again; or raise risky_migrations.lock_retries.");
	MemoryContextSwitchTo(oldcxt);
}

/* others have filled the lock table meanwhile, which no check beforehand can know */
static void
explain_full_lock_table(RmRun *run, ErrorData *error)
{
	MemoryContext oldcxt = MemoryContextSwitchTo(run->cxt);

	error->detail = psprintf("The lock table is full. Nothing was changed by the last transaction of step %s.",
							 run->step->name);
	error->hint = psprintf("Wait until others hold fewer locks, or raise max_locks_per_transaction (it is %d), for which the server must be restarted. SELECT * FROM rm_migrations says what to call then.",
						   max_locks_per_xact);
	MemoryContextSwitchTo(oldcxt);
}

static void
notice_retry(RmRun *run, int tries, const char *blockers)
{
	ereport(NOTICE,
			(errmsg("step %s: a lock on %s was not to be had in time (%s), try %d of %d; others are let through meanwhile",
					run->step->name, run->relation,
					blockers ? blockers : "its holder is gone", tries,
					rm_lock_retries + 1)));
}

/* commits; an error of the commit is returned like one of the work */
static ErrorData *
commit_attempt(RmRun *run)
{
	MemoryContext oldcxt = CurrentMemoryContext;
	ErrorData  *volatile error = NULL;

	PG_TRY();
	{
		rm_commit();
	}
	PG_CATCH();
	{
		MemoryContextSwitchTo(run->cxt);
		error = CopyErrorData();
		FlushErrorState();
		begin_transaction();
	}
	PG_END_TRY();
	MemoryContextSwitchTo(oldcxt);
	return error;
}

/*
 * work(arg) in a transaction of its own, between two of the step's.  Returns
 * NULL, or, after rollback, the error.
 */
ErrorData *
rm_between(RmRun *run, void (*work) (void *arg), void *arg)
{
	ErrorData  *error = rm_try(work, arg, run->cxt);

	if (error == NULL)
		return commit_attempt(run);
	roll_back();
	return error;
}

/* rests, at most until the configuration is reloaded; likewise */
ErrorData *
rm_rest(RmRun *run, int ms)
{
	rm_crew_hold(run);
	return rest_out(run, ms, true, run->cxt);
}

/*
 * Shows in rm_progress why the step does not go on, or, with NULL, that it
 * does; likewise.  Between two transactions of a step only.
 */
ErrorData *
rm_show_wait(RmRun *run, const char *kind, const char *reason)
{
	Wait		wait = {.run = run,.kind = kind,.reason = reason};

	return rm_between(run, log_wait, &wait);
}

/* tells, also in rm_progress, who is in the way of the lock */
static ErrorData *
tell_retry(RmRun *run, int tries)
{
	char	   *blockers = rm_lock_blockers(run->relid, AccessExclusiveLock);

	if (rm_notice_due(run))
		notice_retry(run, tries, blockers);
	return rm_show_wait(run, "lock",
						psprintf("a lock on %s was not to be had in %d tries (%s), others are let through",
								 run->relation, tries,
								 blockers ? blockers : "its holder is gone"));
}

/*
 * Ends the sessions that hold what this step needs a lock on, where the user
 * has asked for it: only those of clients that the current role may end by
 * pg_terminate_backend(), and never a superuser's.
 */
static void
end_blockers(void *arg)
{
	RmRun	   *run = arg;
	Oid			types[] = {INT4ARRAYOID, OIDOID};
	Datum		v[2];
	List	   *pids = rm_lock_blocking_pids(&run->locks);
	Datum	   *elems = palloc(sizeof(Datum) * Max(list_length(pids), 1));
	int			n = 0;
	ListCell   *lc;

	foreach(lc, pids)
		elems[n++] = Int32GetDatum(lfirst_int(lc));
	v[0] = PointerGetDatum(construct_array(elems, n, INT4OID, sizeof(int32), true,
										   TYPALIGN_INT));
	v[1] = ObjectIdGetDatum(GetUserId());
	rm_state_execute("SELECT a.pid::int8, a.usename::text, a.state"
					 " FROM pg_catalog.pg_stat_activity a"
					 " JOIN pg_catalog.pg_roles r ON r.oid = a.usesysid"
					 " WHERE a.pid = ANY ($1) AND a.backend_type = 'client backend'"
					 " AND NOT r.rolsuper"
					 " AND (pg_catalog.pg_has_role($2, r.oid, 'MEMBER')"
					 "  OR pg_catalog.pg_has_role($2, 'pg_signal_backend', 'MEMBER'))",
					 2, types, v, NULL);
	for (uint64 i = 0; i < SPI_processed; i++)
	{
		int			pid = (int) rm_result_int64(i, 1);

		if (!DatumGetBool(DirectFunctionCall2(pg_terminate_backend, Int32GetDatum(pid),
											  Int64GetDatum(0))))
			continue;
		ereport(LOG,
				(errmsg("migration %lld has ended process %d of role \"%s\" (%s), which held a lock on %s",
						(long long) run->migration_id, pid, rm_result_text(i, 2),
						rm_result_text(i, 3), run->relation)));
		ereport(NOTICE,
				(errmsg("step %s: process %d of role \"%s\" was ended, it was in the way for more than %d ms",
						run->step->name, pid, rm_result_text(i, 2), rm_end_blockers_after)));
	}
}

/*
 * Records the failure, if that can be done, and raises it.  A cancellation that comes
 * meanwhile, also of rm_cancel() that the runner has seen before its signal came, is
 * no reason not to: it ends here anyway.
 */
static void
fail(RmRun *run, ErrorData *error)
{
	Attempt		attempt = {.run = run,.error = error};
	ErrorData  *failed;

	rm_crew_dismiss(run);
	run->duration_ms = rm_elapsed_ms(run->started);
	for (int tries = 0; tries < 3; tries++)
	{
		failed = rm_try(record_failure, &attempt, run->cxt);
		if (failed == NULL)
		{
			rm_commit();
			break;
		}
		roll_back();
		if (failed->sqlerrcode != ERRCODE_QUERY_CANCELED)
			break;
	}
	ReThrowError(error);
}

/* what the step has asked for, in a worker: it must be at top level */
static void
run_top_level(void *arg)
{
	RmRun	   *run = arg;
	RmWorkerLocks locks = {.account = &run->locks,.relid = run->top_level_relid,
	.target = run->relid,.tables = run->top_level_tables};

	/*
	 * Such a statement may wait for others: it blocks no reader or writer
	 * meanwhile.  But whoever runs ANALYZE stands behind it with a snapshot,
	 * for which CREATE INDEX CONCURRENTLY waits; ours is the one to give up.
	 */
	(void) set_config_option("lock_timeout", "0", PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_LOCAL, true, 0, false);
	rm_lock_yield_in_deadlocks();
	rm_throttle_building();
	rm_worker_run(run->top_level, run->top_level_what, &locks);
}

/* a step's notices; with one a cancellation may come */
static void
tell_committed(void *arg)
{
	Attempt    *attempt = arg;

	attempt->run->step->committed(attempt->run, attempt->result);
}

/* a transaction has committed: what is to come of it, before the next one */
static ErrorData *
after_commit(RmRun *run, RmStepResult result)
{
	Attempt		attempt = {.run = run,.result = result};
	ErrorData  *error = NULL;

	rm_lock_account_end(&run->locks);
	if (run->locks.blocking)
	{
		if (synchronous_commit > SYNCHRONOUS_COMMIT_OFF)
			XLogFlush(XactLastCommitEnd);
		/* where more of these follow, also for whoever comes just now */
		if (run->locks.queued || !run->step->locks_once)
			let_through_until = TimestampTzPlusMilliseconds(GetCurrentTimestamp(), LET_THROUGH);
	}
	run->duration_ms = rm_elapsed_ms(run->started);
	if (run->step->committed)
		error = rm_try(tell_committed, &attempt, run->cxt);
	if (error)
	{
		roll_back();
		return error;
	}
	if (result == RM_STEP_AGAIN && run->top_level)
	{
		error = rm_try(run_top_level, run, run->cxt);
		if (error)
			roll_back();
		else
			rm_commit();
	}
	return error;
}

/*
 * A transaction, or what was to be done at top level after it, has failed and
 * is rolled back.  Says how long to rest before the next try, or raises the
 * error.
 */
static int
after_failure(RmRun *run, ErrorData *error)
{
	if (rm_steer_interrupted(run, error))
	{
		FreeErrorData(error);
		return 0;				/* the next transaction will see what is wanted */
	}
	if (OidIsValid(run->locks.vacuumed))
	{
		/* nothing was asked for, so this is not a try */
		FreeErrorData(error);
		error = rm_throttle_wraparound(run);
		if (error)
			fail(run, error);
		return 0;
	}
	if (is_lock_failure(error) && run->tries < rm_lock_retries)
	{
		run->tries++;
		run->lock_retries++;
		FreeErrorData(error);
		error = tell_retry(run, run->tries);
		if (run->tries == 1)
			INSTR_TIME_SET_CURRENT(run->first_try);
		else if (error == NULL && rm_end_blockers_after > 0 &&
				 rm_elapsed_ms(run->first_try) >= rm_end_blockers_after)
			error = rm_between(run, end_blockers, run);
		if (error)
			fail(run, error);
		return retry_delay(run->locks.missed ? (run->tries - 1) / run->locks.set_size :
						   run->tries - 1);
	}
	if (run->step->retry && run->step->retry(run, error))
	{
		FreeErrorData(error);
		return 0;
	}
	if (is_lock_failure(error))
		explain_lock_failure(run, error, run->tries + 1);
	else if (error->sqlerrcode == ERRCODE_OUT_OF_MEMORY && error->hint != NULL &&
			 strstr(error->hint, "max_locks_per_transaction") != NULL)
		explain_full_lock_table(run, error);
	else if (run->step->explain)
		run->step->explain(run, error);
	fail(run, error);
	return 0;					/* not reached */
}

static void
run_transactions(RmRun *run)
{
	MemoryContext xact_cxt = AllocSetContextCreate(run->cxt, "rm transaction",
												   ALLOCSET_DEFAULT_SIZES);
	MemoryContext oldcxt = CurrentMemoryContext;
	RmStepResult result = RM_STEP_AGAIN;

	while (result == RM_STEP_AGAIN)
	{
		Attempt		attempt = {.run = run,.result = RM_STEP_AGAIN};
		ErrorData  *error;
		long		let_through;
		int			pause_ms = 0;
		int			tries = run->tries;

		MemoryContextSwitchTo(xact_cxt);
		MemoryContextReset(xact_cxt);
		let_through = TimestampDifferenceMilliseconds(GetCurrentTimestamp(), let_through_until);
		error = rest_out(run, (int) Min(let_through, LET_THROUGH), false, run->cxt);
		if (error == NULL)
			error = rm_throttle(run);
		if (error && !rm_steer_interrupted(run, error))
			fail(run, error);
		error = rm_crew_tend(run);
		if (error)
			fail(run, error);
		error = rm_try(attempt_step, &attempt, run->cxt);
		run->m = NULL;
		if (error == NULL)
			error = commit_attempt(run);
		else
			roll_back();

		if (error == NULL && attempt.steered)
		{
			rm_lock_account_end(&run->locks);
			rm_crew_dismiss(run);	/* a pause holds nothing */
			error = rm_steer_obey(run);
			if (error)
				fail(run, error);
			continue;
		}
		if (error == NULL)
		{
			result = attempt.result;
			pause_ms = run->pause_ms;
			error = after_commit(run, result);
		}
		else
			rm_lock_account_end(&run->locks);
		if (error)
			pause_ms = after_failure(run, error);
		else
			run->tries = 0;

		error = rest_out(run, pause_ms, false, run->cxt);
		run->wait_for_helpers = false;
		if (error == NULL && run->tries > tries)
			error = rm_show_wait(run, NULL, NULL);
		if (error && !rm_steer_interrupted(run, error))
			fail(run, error);
	}
	MemoryContextSwitchTo(oldcxt);
}

/* one step from its beginning to its end; the caller holds the runner's lock */
static void
run_to_the_end(RmRun *run)
{
	run->cxt = AllocSetContextCreate(CurrentMemoryContext, "rm step",
									 ALLOCSET_DEFAULT_SIZES);
	run->locks.cxt = run->cxt;
	INSTR_TIME_SET_CURRENT(run->started);
	run->wal_started = pgWalUsage.wal_bytes;
	run->may_hold = run->step->throttled && !run->revert;

	rm_transaction(log_begin, run);
	PG_TRY();
	{
		run_transactions(run);
	}
	PG_FINALLY();
	{
		rm_crew_dismiss(run);
	}
	PG_END_TRY();
	rm_transaction(log_locks, run);
	MemoryContextDelete(run->cxt);
}

/*-------------------------------------------------------------------------
 * A helper
 *-------------------------------------------------------------------------
 */

/* one transaction of a helper; done if there is nothing for it to do */
static void
attempt_help(void *arg)
{
	Attempt    *attempt = arg;
	RmRun	   *run = attempt->run;

	begin_attempt(run);
	attempt->result = RM_STEP_DONE;
	if (rm_range_take(run) != RM_RANGE_TAKEN)
		return;
	/* after that, so that it is what it was when the range was made, or newer */
	run->m = rm_migration_load(run->migration_id, false, CurrentMemoryContext);
	if (run->aside != (run->m->ranges == 0))
	{
		/* not what this helper is for: it will be sent away */
		run->range.number = 0;
		return;
	}
	attempt->result = RM_STEP_AGAIN;
	run->step->help(run);
	run->transactions++;
	rm_range_save(run);
	rm_lock_account_collect(&run->locks, run->relid, NIL);
	choose_synchronous_commit(run);
}

/* reads what does not change */
static void
prepare_help(void *arg)
{
	RmRun	   *run = arg;
	RmMigration *m = rm_migration_load(run->migration_id, false, run->cxt);

	run->step = m->method->steps[run->step_index];
	run->approach = m->method->name;
	run->relid = m->relid;
	run->relation = m->relation;
}

/*
 * A transaction of a helper has failed and is rolled back: how long to rest
 * before the next try.  Raises what the runner would have raised.
 */
static int
after_failed_help(RmRun *run, ErrorData *error)
{
	if (is_lock_failure(error) && run->tries < rm_lock_retries)
	{
		run->tries++;
		run->lock_retries++;
		return retry_delay(run->tries - 1);
	}
	if (run->step->retry && run->step->retry(run, error))
		return 0;
	if (is_lock_failure(error))
		explain_lock_failure(run, error, run->tries + 1);
	ReThrowError(error);
	return 0;					/* not reached */
}

/*
 * What a helper does, from its beginning to its end: one transaction after the
 * other on ranges that it takes, as long as the runner lets it.  Errors are
 * raised, for the runner to record them.
 */
void
rm_run_helper(RmRun *run)
{
	MemoryContext xact_cxt;
	MemoryContext oldcxt = CurrentMemoryContext;
	ErrorData  *error = NULL;
	bool		idle = false;

	run->cxt = AllocSetContextCreate(CurrentMemoryContext, "rm helper's step",
									 ALLOCSET_DEFAULT_SIZES);
	run->locks.cxt = run->cxt;
	xact_cxt = AllocSetContextCreate(run->cxt, "rm transaction", ALLOCSET_DEFAULT_SIZES);
	INSTR_TIME_SET_CURRENT(run->started);
	run->wal_started = pgWalUsage.wal_bytes;
	rm_transaction(prepare_help, run);

	while (rm_crew_may_go_on(run, idle, &error))
	{
		Attempt		attempt = {.run = run,.result = RM_STEP_DONE};
		int			pause_ms;

		MemoryContextSwitchTo(xact_cxt);
		MemoryContextReset(xact_cxt);
		if (run->aside)
			rm_throttle_aside_begins(run);
		error = rm_try(attempt_help, &attempt, run->cxt);
		run->m = NULL;
		if (error == NULL)
			error = commit_attempt(run);
		else
			roll_back();
		rm_lock_account_end(&run->locks);
		idle = error == NULL && attempt.result == RM_STEP_DONE;
		if (error)
			pause_ms = after_failed_help(run, error);
		else
		{
			run->tries = 0;
			pause_ms = run->pause_ms;
			if (!idle && run->step->committed)
				run->step->committed(run, RM_STEP_AGAIN);
		}
		rm_crew_publish(run);
		if (run->aside)
			rm_throttle_aside_ends(run);
		error = rest_out(NULL, pause_ms, false, run->cxt);
		if (error)
			break;
	}
	MemoryContextSwitchTo(oldcxt);
	if (error)
		ReThrowError(error);
	rm_transaction(log_locks, run);
}

/*
 * Makes this session the runner of the migration, until as many calls of
 * rm_runner_unlock() or its end.  55006 if another session is.
 */
void
rm_become_runner(const RmMigration *m)
{
	int			pid;

	if (!rm_runner_lock(RM_RUNNER_MIGRATION, m->id, &pid))
		ereport(ERROR,
				(errcode(ERRCODE_OBJECT_IN_USE),
				 errmsg("migration %lld is already running in another session",
						(long long) m->id),
				 errdetail("Process %d runs it.", pid),
				 errhint("Wait for it, or stop it with SELECT rm_cancel(%lld).",
						 (long long) m->id)));
}

/*
 * Applies or reverts one step of a migration.  Called by a procedure after
 * rm_procedure_begin().  55006 if another session runs the migration.
 */
void
rm_run_step(RmMigration *m, int step_index, bool revert, int batch)
{
	RmRun		run = {0};
	bool		one_of_many = rm_runner_lock_held(RM_RUNNER_MIGRATION, m->id);

	run.migration_id = m->id;
	run.step = m->method->steps[step_index];
	run.step_index = step_index;
	run.revert = revert;
	run.batch = batch;
	run.approach = m->method->name;
	run.relid = m->relid;
	run.relation = m->relation;

	rm_become_runner(m);
	PG_TRY();
	{
		if (!one_of_many)
			rm_steer_begin(m->id);
		run_to_the_end(&run);
	}
	PG_FINALLY();
	{
		rm_runner_unlock(RM_RUNNER_MIGRATION, m->id);
	}
	PG_END_TRY();
}

/*
 * The same for a step of the lab that belongs to no migration.  It sets
 * relid and relation itself when they become known.
 */
void
rm_run_free_step(const char *approach, const RmStep *step, bool revert,
				 void *work)
{
	RmRun		run = {0};

	run.step = step;
	run.revert = revert;
	run.work = work;
	run.approach = approach;
	run.relation = "";
	run_to_the_end(&run);
}
