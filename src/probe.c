/*-------------------------------------------------------------------------
 *
 * probe.c
 *	  Probes: background workers that run one query again and again, as the
 *	  role that started them, and record each latency.
 *
 *	  rm_probe_start(): row in the table probe, worker registered
 *		   | commit
 *		   v
 *	  worker: lock the id -> wait for the starter's commit -> read the row
 *			  -> tick, tick, tick, ...				(samples in a ring buffer)
 *				 every 250 ms: is there still a row? any need to end?
 *				 every 500 ms: samples into the table probe_sample
 *			  -> store the rest, note the end in the row
 *
 * The schedule is open-loop, and that is the point of it.  Tick k is due at
 * start + k * every, whatever became of tick k - 1, and its latency counts
 * from the moment it was due.  If the table is locked for 4 s, a loop that
 * waits for each answer before it asks again would record one slow query; the
 * users who would have come meanwhile have all waited, the first one 4 s, the
 * last one not at all.  So after a stall all missed ticks are run, one after
 * the other without sleeping, each with its own due time ("coordinated
 * omission" is the usual name of the mistake).  The price: every must be
 * longer than the query takes, or the backlog grows until all ticks time out.
 *
 * What the worker itself does between ticks must not look like a slow
 * database.  It is done in the pauses where there are any, and the time that
 * it takes is not counted (see own_work_since).  A tick that is due less than
 * a millisecond from now is waited for without the latch, whose milliseconds
 * are too coarse.
 *
 * Whether a probe runs, and in which process, is answered by the lock table:
 * the worker holds a session-level advisory lock on the probe's id.  No stored
 * process id needs to be believed, and nothing is left when the server dies.
 *
 * Easy to get wrong:
 *
 * - Whose rights.  Each tick runs as the caller's role in a context in which
 *	 SET ROLE and SET SESSION AUTHORIZATION are refused (as within a SECURITY
 *	 DEFINER function).  Otherwise a function that is SECURITY DEFINER could
 *	 have a probe do RESET ROLE, and get at the rights of whoever called it.
 *
 * - Sleeping with something in hand.  Between ticks the worker is outside of
 *	 any transaction: no lock but its own, no snapshot, nothing that DROP TABLE,
 *	 DROP EXTENSION or VACUUM would wait for.  Its own transactions have a
 *	 lock_timeout that is shorter than deadlock_timeout, so in a deadlock it is
 *	 the worker that gives way, and the samples are stored the next time.
 *
 * - Cancelling.  A cancel request that comes between ticks must neither hit the
 *	 next tick nor end the worker: cancels are held off except inside
 *	 try_transaction(), and forgotten at its beginning.
 *
 * - Queries that catch their cancellation (EXCEPTION WHEN query_canceled).
 *	 They must not keep a server from shutting down; see watch_over().
 *
 * Copyright (c) 2026, risky_migrations contributors
 *
 *-------------------------------------------------------------------------
 */
#include "postgres.h"

#include <signal.h>

#include "access/xact.h"
#include "access/xlog.h"
#include "catalog/pg_database.h"
#include "catalog/pg_type.h"
#include "compat.h"
#include "conversion.h"
#include "executor/spi.h"
#include "fmgr.h"
#include "mb/pg_wchar.h"
#include "miscadmin.h"
#include "nodes/parsenodes.h"
#include "parser/parser.h"
#include "pgstat.h"
#include "portability/instr_time.h"
#include "postmaster/bgworker.h"
#include "postmaster/interrupt.h"
#include "probe.h"
#include "state.h"
#include "storage/ipc.h"
#include "storage/latch.h"
#include "storage/lmgr.h"
#include "storage/lock.h"
#include "tcop/dest.h"
#include "tcop/tcopprot.h"
#include "tcop/utility.h"
#include "utils/acl.h"
#include "utils/array.h"
#include "utils/builtins.h"
#include "utils/guc.h"
#include "utils/memutils.h"
#include "utils/snapmgr.h"
#include "utils/timeout.h"
#include "utils/timestamp.h"
#include "worker.h"

/* bgw_type, as pg_stat_activity shows it */
#define PROBE_WORKER_TYPE "risky_migrations probe"

/* fourth field of the advisory lock; SQL's own functions use 1 and 2 */
#define PROBE_LOCK_KIND 4

/* limits of what may be asked for, microseconds */
#define MIN_EVERY INT64CONST(1000)
#define MAX_EVERY (INT64CONST(3600) * USECS_PER_SEC)
#define MAX_TIMEOUT (INT64CONST(3600) * USECS_PER_SEC)
#define MAX_TIME_LIMIT (INT64CONST(7) * USECS_PER_DAY)

/* between two looks whether to go on; between two flushes, microseconds */
#define CHECK_INTERVAL INT64CONST(250000)
#define FLUSH_INTERVAL INT64CONST(500000)

/* samples: flush as soon as, at most in one command, at most kept in memory */
#define FLUSH_SAMPLES 1000
#define FLUSH_MAX 5000
#define MAX_SAMPLES 100000

/* lock_timeout while probing and at the end, milliseconds, as settings */
#define PROBING_LOCK_TIMEOUT "100"
#define ENDING_LOCK_TIMEOUT "250"

#define MAX_MESSAGE 500			/* bytes of an error message that are kept */
#define ID_LOCK_PATIENCE 2000	/* ms that a predecessor may take to end */
#define WATCH_INTERVAL 500		/* ms between two looks at a running query */
#define STOP_GRACE 250			/* ms for what is due when a probe is stopped */
#define STOP_PATIENCE 10000		/* ms that rm_probe_stop waits */

typedef enum Outcome
{
	OUTCOME_OK,
	OUTCOME_TIMEOUT,
	OUTCOME_ERROR
} Outcome;

static const char *const outcome_names[] = {"ok", "timeout", "error"};

/* One latency. */
typedef struct Sample
{
	TimestampTz at;				/* when the tick was due */
	double		latency_ms;
	Outcome		outcome;
	char		sqlstate[6];	/* "" if ok */
	char	   *message;		/* NULL if ok */
} Sample;

/* What the starter tells the worker before there is a row to read. */
typedef struct ProbeOrder
{
	int64		id;
	Oid			database;
	Oid			session_user;
	TransactionId starter;		/* top-level transaction of the starter */
} ProbeOrder;

StaticAssertDecl(sizeof(ProbeOrder) <= BGW_EXTRALEN,
				 "order of a probe does not fit into bgw_extra");

/*
 * The probe that this worker is.  Times are microseconds of the monotonic
 * clock unless they are a TimestampTz.
 */
typedef struct Probe
{
	int64		id;
	Oid			relid;			/* of the table probe when we began */
	Oid			role;			/* runs the query */
	char	   *query;
	int64		every;
	int64		timeout;
	int64		time_limit;

	int64		began;
	TimestampTz began_at;		/* the same moment */
	int64		next_tick;		/* number of the next tick to be run */

	int64		busy_from;		/* our own work the last time */
	int64		busy_until;
	int64		last_check;
	int64		last_flush;		/* also if it failed */
	bool		work_failed;	/* our own work, the last time */

	const char *end_reason;		/* set when it is time to end */
	bool		gone;			/* row or table is: nothing left to write to */

	Sample	   *samples;		/* ring buffer of MAX_SAMPLES */
	int			first_sample;
	int			nsamples;
	int64		lost_samples;

	MemoryContext tick_context; /* reset after each tick */
	TimeoutId	watch;
	uint32		wait_event;
} Probe;

/* Our own work in one transaction: what to do, and what was done. */
typedef struct Housekeeping
{
	const char *lock_timeout;
	bool		flush;
	int			nflushed;
} Housekeeping;

/* What a stop request means; only the worker sets it. */
typedef enum Phase
{
	PHASE_WAITING,				/* for the starter: there is nothing to save */
	PHASE_PROBING,				/* first finish what is due, then cancel */
	PHASE_ENDING				/* we are at it */
} Phase;

PG_FUNCTION_INFO_V1(rm_probe_start);
PG_FUNCTION_INFO_V1(rm_probe_stop);

PGDLLEXPORT void rm_probe_main(Datum main_arg);

static Probe self;

/* set by signal handlers */
static volatile sig_atomic_t stop_asked = false;	/* end, run what is due */
static volatile sig_atomic_t hurry = false; /* end, and run nothing more */
static volatile sig_atomic_t terminated = false;	/* both, by SIGTERM */
static volatile sig_atomic_t phase = PHASE_WAITING;

/*
 * Settings that decide what the query means: they go from the caller's session
 * into the row, and from there into the worker's.
 */
static const char *const carried_settings[] = {
	"search_path",
	"DateStyle",
	"IntervalStyle",
	"TimeZone",
	"bytea_output",
	"default_text_search_config",
	"extra_float_digits",
	"row_security",
	"standard_conforming_strings",
	"transform_null_equals",
	"xmloption",
};

/* ------------------------------------------------------------------------
 * For both sides
 * ------------------------------------------------------------------------
 */

/* The lock that a probe's worker holds as long as it lives. */
static void
set_probe_tag(LOCKTAG *tag, int64 id)
{
	SET_LOCKTAG_ADVISORY(*tag, MyDatabaseId, (uint32) ((uint64) id >> 32),
						 (uint32) id, PROBE_LOCK_KIND);
}

int
rm_probe_pid(int64 id)
{
	LOCKTAG		tag;
	LockData   *locks = GetLockStatusData();
	int			pid = 0;

	set_probe_tag(&tag, id);
	for (int i = 0; i < locks->nelements; i++)
	{
		LockInstanceData *lock = &locks->locks[i];

		if (memcmp(&lock->locktag, &tag, sizeof(LOCKTAG)) == 0 &&
			(lock->holdMask & LOCKBIT_ON(ExclusiveLock)) != 0)
			pid = lock->pid;
	}
	pfree(locks->locks);
	pfree(locks);
	return pid;
}

/* Length of an interval without months, microseconds; must fit into int64. */
static int64
interval_microseconds(Datum value)
{
	const Interval *interval = DatumGetIntervalP(value);

	return interval->day * USECS_PER_DAY + interval->time;
}

/* ------------------------------------------------------------------------
 * rm_probe_start
 * ------------------------------------------------------------------------
 */

/*
 * Refuses an interval that is not within [min, max] microseconds; range says
 * so in words.  (Doubles, because an interval may be longer than an int64.)
 */
static void
check_interval(const Interval *interval, const char *name, int64 min,
			   int64 max, const char *range)
{
	double		length = interval->day * (double) USECS_PER_DAY + interval->time;

	if (interval->month != 0)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("%s must not contain months or years", name),
				 errdetail("Their length is not fixed."),
				 errhint("Use a value %s.", range)));
	if (length < min || length > max)
		ereport(ERROR,
				(errcode(ERRCODE_INVALID_PARAMETER_VALUE),
				 errmsg("%s is out of range", name),
				 errdetail("It is %s.",
						   DatumGetCString(DirectFunctionCall1(interval_out,
															   IntervalPGetDatum(interval)))),
				 errhint("Use a value %s.", range)));
}

/*
 * Error context of the parser: what it has to say about a position is about
 * the query, not about the statement that the client sent.
 */
static void
mark_query_position(void *arg)
{
	int			position = geterrposition();

	if (position > 0)
	{
		errposition(0);
		internalerrposition(position);
		internalerrquery((const char *) arg);
	}
}

/* Refuses what is not exactly one statement that a probe can run. */
static void
check_query(char *query)
{
	MemoryContext cxt = CurrentMemoryContext;
	ErrorContextCallback callback;
	List	   *volatile statements = NIL;
	Node	   *statement;

	callback.callback = mark_query_position;
	callback.arg = query;
	callback.previous = error_context_stack;
	error_context_stack = &callback;
	PG_TRY();
	{
		statements = raw_parser(query, RAW_PARSE_DEFAULT);
	}
	PG_CATCH();
	{
		rm_rethrow_explained(cxt, NULL, psprintf("The query of the probe is: %s", query),
							 "Give one statement as you would type it, without a semicolon.");
	}
	PG_END_TRY();
	error_context_stack = callback.previous;

	if (list_length(statements) != 1)
		ereport(ERROR,
				(errcode(ERRCODE_SYNTAX_ERROR),
				 statements == NIL
				 ? errmsg("the query of a probe is empty")
				 : errmsg("the query of a probe must be one statement, not %d",
						  list_length(statements)),
				 errdetail("Its latency is that of one statement in a transaction of its own."),
				 errhint("A DO block or a function can contain several statements.")));

	statement = linitial_node(RawStmt, statements)->stmt;
	if (IsA(statement, TransactionStmt) ||
		(IsA(statement, CopyStmt) &&
		 ((CopyStmt *) statement)->filename == NULL))
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("a probe cannot run %s", CreateCommandName(statement)),
				 errdetail("Each run is a transaction of its own, and there is no client to copy from or to."),
				 errhint("Give a query, a statement that writes, or a DO block.")));
}

/*
 * Refuses, before anything is changed, what cannot become a probe.  (What only
 * the attempt can show, the lack of a worker, takes everything back again.)
 */
static void
check_start(FunctionCallInfo fcinfo)
{
	static const char *const names[] = {"query", "every", "timeout", "time_limit"};

	if (RecoveryInProgress())
		ereport(ERROR,
				(errcode(ERRCODE_READ_ONLY_SQL_TRANSACTION),
				 errmsg("cannot start a probe during recovery"),
				 errdetail("A probe writes its samples into a table."),
				 errhint("Start it on the primary.")));
	PreventCommandIfReadOnly("rm_probe_start()");
	if (InSecurityRestrictedOperation())
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("cannot start a probe within a security-restricted operation"),
				 errdetail("An index expression or the like, which runs as the table's owner, has called it."),
				 errhint("Call it in a statement of your own.")));

	for (int i = 0; i < lengthof(names); i++)
		if (PG_ARGISNULL(i))
			ereport(ERROR,
					(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
					 errmsg("%s must not be NULL", names[i]),
					 errdetail("A probe runs one query, every so often, with a timeout, up to a time limit."),
					 i > 0 ? errhint("Give it, or leave it out for its default.") :
					 errhint("Give the query.")));

	check_query(text_to_cstring(PG_GETARG_TEXT_PP(0)));
	check_interval(PG_GETARG_INTERVAL_P(1), names[1], MIN_EVERY, MAX_EVERY,
				   "of at least 1 ms and at most 1 hour");
	check_interval(PG_GETARG_INTERVAL_P(2), names[2], 1, MAX_TIMEOUT,
				   "of more than 0 and at most 1 hour");
	check_interval(PG_GETARG_INTERVAL_P(3), names[3], 1, MAX_TIME_LIMIT,
				   "of more than 0 and at most 7 days");

	if (!rm_worker_can_be(GetSessionUserId()))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("a probe cannot connect as role \"%s\"",
						GetUserNameFromId(GetSessionUserId(), false)),
				 errdetail("Before PostgreSQL 17 a background worker needs the attribute LOGIN."),
				 errhint("Connect as a role that may log in, then SET ROLE.")));
}

/* The caller's settings as text[] of name=value. */
static Datum
caller_settings(void)
{
	Datum		elements[lengthof(carried_settings)];

	for (int i = 0; i < lengthof(carried_settings); i++)
	{
		const char *value = GetConfigOption(carried_settings[i], false, false);

		elements[i] = CStringGetTextDatum(psprintf("%s=%s", carried_settings[i],
												   value ? value : ""));
	}
	return PointerGetDatum(construct_array(elements, lengthof(carried_settings),
										   TEXTOID, -1, false, TYPALIGN_INT));
}

/* Registers the worker, which will wait for the end of this transaction. */
static void
register_probe(int64 id)
{
	ProbeOrder	order;

	memset(&order, 0, sizeof(order));
	order.id = id;
	order.database = MyDatabaseId;
	order.session_user = GetSessionUserId();
	order.starter = GetTopTransactionId();
	(void) rm_worker_register(psprintf("risky_migrations probe " INT64_FORMAT, id),
							  PROBE_WORKER_TYPE, "rm_probe_main", (Datum) 0,
							  &order, sizeof(order), false, "a probe");
}

/*
 * rm_probe_start(query text, every interval, timeout interval,
 *				  time_limit interval) returns bigint
 *
 * Starts a probe and returns its id.  It begins when this transaction commits.
 */
Datum
rm_probe_start(PG_FUNCTION_ARGS)
{
	Oid			types[] = {
		OIDOID, OIDOID, TEXTOID, INTERVALOID, INTERVALOID, INTERVALOID,
		TEXTARRAYOID
	};
	Datum		values[lengthof(types)];
	int64		id;

	check_start(fcinfo);

	SPI_connect();
	values[0] = ObjectIdGetDatum(GetUserId());
	values[1] = ObjectIdGetDatum(GetSessionUserId());
	values[2] = PG_GETARG_DATUM(0);
	values[3] = PG_GETARG_DATUM(1);
	values[4] = PG_GETARG_DATUM(2);
	values[5] = PG_GETARG_DATUM(3);
	values[6] = caller_settings();
	rm_state_execute("INSERT INTO risky_migrations.probe"
					 " (owner, session_role, query, every, timeout, time_limit, settings)"
					 " VALUES ($1, $2, $3, $4, $5, $6, $7) RETURNING id",
					 lengthof(types), types, values, NULL);
	id = rm_result_int64(0, 1);
	SPI_finish();

	register_probe(id);
	PG_RETURN_INT64(id);
}

/* ------------------------------------------------------------------------
 * rm_probe_stop
 * ------------------------------------------------------------------------
 */

/* Refuses to stop what is not there or not the caller's; needs SPI. */
static void
check_stop(int64 id)
{
	Oid			type = INT8OID;
	Datum		value = Int64GetDatum(id);
	Oid			owner;

	rm_state_execute("SELECT owner FROM risky_migrations.probe WHERE id = $1",
					 1, &type, &value, NULL);
	if (SPI_processed == 0)
		ereport(ERROR,
				(errcode(ERRCODE_UNDEFINED_OBJECT),
				 errmsg("probe " INT64_FORMAT " does not exist", id),
				 errdetail("It was never started, or its row has been deleted."),
				 errhint("The view rm_probes lists the probes.")));
	owner = DatumGetObjectId(rm_result_datum(0, 1));
	if (!has_privs_of_role(GetUserId(), owner))
		ereport(ERROR,
				(errcode(ERRCODE_INSUFFICIENT_PRIVILEGE),
				 errmsg("permission denied for probe " INT64_FORMAT, id),
				 errdetail("It belongs to another role."),
				 errhint("Only a member of the role that started a probe, or a superuser, can stop it.")));
}

/*
 * Asks the worker, if there is one, to end, and waits until it has ended and
 * its slot is free.  The first signal lets it run what is due already, which
 * takes a moment after a stall and is what a stall is measured by; the second
 * one cancels.
 */
static void
stop_running_probe(int64 id)
{
	TimestampTz asked_at = GetCurrentTimestamp();
	int			signals = 0;
	int			last_pid = 0;
	long		pause = 1;

	for (;;)
	{
		int			pid = rm_probe_pid(id);
		const char *slot_type = NULL;

		if (pid != 0)
		{
			if (signals == 0 ||
				(signals == 1 &&
				 TimestampDifferenceExceeds(asked_at, GetCurrentTimestamp(), STOP_GRACE)))
			{
				kill(pid, SIGUSR2);
				signals++;
			}
			last_pid = pid;
		}
		else if (last_pid != 0)
			slot_type = GetBackgroundWorkerTypeByPid(last_pid);
		if (pid == 0 &&
			(slot_type == NULL || strcmp(slot_type, PROBE_WORKER_TYPE) != 0))
			return;

		if (TimestampDifferenceExceeds(asked_at, GetCurrentTimestamp(), STOP_PATIENCE))
			ereport(ERROR,
					(errcode(ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE),
					 errmsg("probe " INT64_FORMAT " did not end within %d s",
							id, STOP_PATIENCE / 1000),
					 errdetail("Its worker, process %d, does not heed that its query was cancelled.",
							   last_pid),
					 errhint("Try again, or end the worker with pg_terminate_backend(%d).",
							 last_pid)));

		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 pause, rm_wait_event("RiskyMigrationsProbeStop"));
		ResetLatch(MyLatch);
		CHECK_FOR_INTERRUPTS();
		pause = Min(pause * 2, 20);
	}
}

/*
 * rm_probe_stop(id bigint) returns bigint
 *
 * Ends a probe and returns how many samples it has recorded.  The worker is
 * gone before the row is touched, because it updates the row too.  If it has
 * not begun yet (it waits for this very transaction, or the postmaster has not
 * come to it), it will find the row ended.
 */
Datum
rm_probe_stop(PG_FUNCTION_ARGS)
{
	Oid			type = INT8OID;
	Datum		value = PG_GETARG_DATUM(0);
	int64		count;

	if (PG_ARGISNULL(0))
		ereport(ERROR,
				(errcode(ERRCODE_NULL_VALUE_NOT_ALLOWED),
				 errmsg("id must not be NULL"),
				 errdetail("The call does not say which probe is meant."),
				 errhint("Give the id that rm_probe_start() returned; the view rm_probes lists them.")));
	if (RecoveryInProgress())
		ereport(ERROR,
				(errcode(ERRCODE_READ_ONLY_SQL_TRANSACTION),
				 errmsg("cannot stop a probe during recovery"),
				 errdetail("There are none on a standby."),
				 errhint("Stop it on the primary.")));
	PreventCommandIfReadOnly("rm_probe_stop()");
	if (IsolationUsesXactSnapshot())
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("cannot stop a probe in a REPEATABLE READ or SERIALIZABLE transaction"),
				 errdetail("Its snapshot would not show what the probe still records."),
				 errhint("Call rm_probe_stop in a READ COMMITTED transaction.")));

	SPI_connect();
	check_stop(PG_GETARG_INT64(0));
	stop_running_probe(PG_GETARG_INT64(0));
	rm_state_execute("UPDATE risky_migrations.probe"
					 " SET ended_at = clock_timestamp(), end_reason = 'stopped'"
					 " WHERE id = $1 AND ended_at IS NULL",
					 1, &type, &value, NULL);

	/* a worker that came to life between our look and our update */
	stop_running_probe(PG_GETARG_INT64(0));

	rm_state_execute("SELECT count(*) FROM risky_migrations.probe_sample"
					 " WHERE probe_id = $1",
					 1, &type, &value, NULL);
	count = rm_result_int64(0, 1);
	SPI_finish();
	PG_RETURN_INT64(count);
}

/* ------------------------------------------------------------------------
 * The worker: signals, clock and transactions
 * ------------------------------------------------------------------------
 */

static void
cancel_query(void)
{
	InterruptPending = true;
	QueryCancelPending = true;
}

/* SIGUSR2: end; at the second time, or if nothing runs yet, at once. */
static void
handle_stop(SIGNAL_ARGS)
{
	int			save_errno = errno;

	if (phase == PHASE_WAITING || (phase == PHASE_PROBING && stop_asked))
	{
		hurry = true;
		cancel_query();
	}
	stop_asked = true;
	SetLatch(MyLatch);
	errno = save_errno;
}

/* SIGTERM: end at once, but store what there is. */
static void
handle_terminate(SIGNAL_ARGS)
{
	int			save_errno = errno;

	terminated = true;
	hurry = true;
	stop_asked = true;
	if (phase != PHASE_ENDING)
		cancel_query();
	SetLatch(MyLatch);
	errno = save_errno;
}

/*
 * Timer that looks at a running query now and then.  handle_terminate() only
 * cancels, so that the samples can be stored; a query that is still there some
 * time later has caught its cancellation, and then the whole process goes.
 */
static void
watch_over(void)
{
	if (terminated)
	{
		InterruptPending = true;
		ProcDiePending = true;
		SetLatch(MyLatch);
	}
}

static int64
now_us(void)
{
	instr_time	now;

	INSTR_TIME_SET_CURRENT(now);
	return (int64) INSTR_TIME_GET_MICROSEC(now);
}

static int64
due_time(int64 tick)
{
	return self.began + tick * self.every;
}

/*
 * Runs work in a transaction of its own, as role (with SET ROLE refused) or,
 * if that is InvalidOid, as the session's user.  Returns true if it committed;
 * else *error is the reason, in the current memory context.
 */
static bool
try_transaction(Oid role, void (*work) (void *), void *arg, ErrorData **error)
{
	MemoryContext context = CurrentMemoryContext;
	Oid			save_userid;
	int			save_sec_context;
	volatile bool ok = false;

	GetUserIdAndSecContext(&save_userid, &save_sec_context);
	QueryCancelPending = false;
	RESUME_CANCEL_INTERRUPTS();

	PG_TRY();
	{
		SetCurrentStatementStartTimestamp();
		StartTransactionCommand();
		XactIsoLevel = XACT_READ_COMMITTED;
		if (OidIsValid(role))
			SetUserIdAndSecContext(role, save_sec_context |
								   SECURITY_LOCAL_USERID_CHANGE);

		work(arg);

		/* as the same role: the commit can fire triggers */
		CommitTransactionCommand();
		disable_all_timeouts(false);
		SetUserIdAndSecContext(save_userid, save_sec_context);
		ok = true;
	}
	PG_CATCH();
	{
		disable_all_timeouts(false);
		MemoryContextSwitchTo(context);
		*error = CopyErrorData();
		FlushErrorState();
		AbortCurrentTransaction();
	}
	PG_END_TRY();

	HOLD_CANCEL_INTERRUPTS();
	MemoryContextSwitchTo(context);
	return ok;
}

/*
 * Gives the worker's own transaction what the user's query may have taken from
 * the session, and a bound to its waits.
 */
static void
begin_own_work(const char *lock_timeout)
{
	XactReadOnly = false;
	XactDeferrable = false;
	(void) set_config_option("lock_timeout", lock_timeout, PGC_USERSET,
							 PGC_S_SESSION, GUC_ACTION_LOCAL, true, 0, false);
	(void) set_config_option("synchronous_commit", "off", PGC_USERSET,
							 PGC_S_SESSION, GUC_ACTION_LOCAL, true, 0, false);
	SPI_connect();
	PushActiveSnapshot(GetTransactionSnapshot());
}

static void
end_own_work(void)
{
	PopActiveSnapshot();
	SPI_finish();
}

/* Sleeps until then, or until a signal comes; outside a transaction. */
static void
sleep_until(int64 then)
{
	int64		left = then - now_us();

	if (left >= 1000)
	{
		(void) WaitLatch(MyLatch, WL_LATCH_SET | WL_TIMEOUT | WL_EXIT_ON_PM_DEATH,
						 (long) (left / 1000), self.wait_event);
		ResetLatch(MyLatch);
	}
	else if (left > 0)
		pg_usleep((long) left);

	/* may end the process, but is not cancelled: that is held off */
	CHECK_FOR_INTERRUPTS();
	if (ConfigReloadPending)
	{
		ConfigReloadPending = false;
		ProcessConfigFile(PGC_SIGHUP);
	}
}

/* ------------------------------------------------------------------------
 * The worker: samples
 * ------------------------------------------------------------------------
 */

/*
 * Keeps a sample until it is stored.  If too many could not be stored the
 * oldest one goes: the newest are those of the trouble that is going on.
 */
static void
keep_sample(int64 tick, int64 latency, Outcome outcome, int sqlerrcode,
			const char *message)
{
	Sample	   *sample;

	if (self.nsamples == MAX_SAMPLES)
	{
		sample = &self.samples[self.first_sample];
		if (sample->message)
			pfree(sample->message);
		self.first_sample = (self.first_sample + 1) % MAX_SAMPLES;
		self.nsamples--;
		self.lost_samples++;
	}

	sample = &self.samples[(self.first_sample + self.nsamples++) % MAX_SAMPLES];
	sample->at = self.began_at + tick * self.every;
	sample->latency_ms = latency / 1000.0;
	sample->outcome = outcome;
	sample->sqlstate[0] = '\0';
	sample->message = NULL;
	if (outcome != OUTCOME_OK)
	{
		int			len = pg_mbcliplen(message, strlen(message), MAX_MESSAGE);

		strlcpy(sample->sqlstate, unpack_sql_state(sqlerrcode),
				sizeof(sample->sqlstate));
		sample->message = MemoryContextAlloc(TopMemoryContext, len + 1);
		memcpy(sample->message, message, len);
		sample->message[len] = '\0';
	}
}

/* Forgets the oldest samples: they are stored. */
static void
forget_samples(int count)
{
	for (int i = 0; i < count; i++)
	{
		Sample	   *sample = &self.samples[self.first_sample];

		if (sample->message)
			pfree(sample->message);
		self.first_sample = (self.first_sample + 1) % MAX_SAMPLES;
	}
	self.nsamples -= count;
}

/* An array of count elements of type text; null may be NULL for none. */
static Datum
text_array(Datum *elements, bool *null, int count)
{
	int			lower_bound = 1;

	return PointerGetDatum(construct_md_array(elements, null, 1, &count,
											  &lower_bound, TEXTOID, -1, false,
											  TYPALIGN_INT));
}

/* An array of count elements of a type of eight bytes. */
static Datum
eight_byte_array(Datum *elements, int count, Oid type)
{
	return PointerGetDatum(construct_array(elements, count, type, 8,
										   FLOAT8PASSBYVAL, TYPALIGN_DOUBLE));
}

/*
 * Writes the oldest samples, in one command.  Returns how many; they are to be
 * forgotten when the transaction has committed.
 */
static int
insert_samples(void)
{
	int			count = Min(self.nsamples, FLUSH_MAX);
	Datum	   *at = palloc(sizeof(Datum) * count);
	Datum	   *latency = palloc(sizeof(Datum) * count);
	Datum	   *outcome = palloc(sizeof(Datum) * count);
	Datum	   *sqlstate = palloc0(sizeof(Datum) * count);
	Datum	   *message = palloc0(sizeof(Datum) * count);
	bool	   *ok = palloc(sizeof(bool) * count);
	Oid			types[] = {
		INT8OID, TIMESTAMPTZARRAYOID, FLOAT8ARRAYOID, TEXTARRAYOID,
		TEXTARRAYOID, TEXTARRAYOID
	};
	Datum		values[lengthof(types)];

	for (int i = 0; i < count; i++)
	{
		Sample	   *sample = &self.samples[(self.first_sample + i) % MAX_SAMPLES];

		at[i] = TimestampTzGetDatum(sample->at);
		latency[i] = Float8GetDatum(sample->latency_ms);
		outcome[i] = CStringGetTextDatum(outcome_names[sample->outcome]);
		ok[i] = sample->outcome == OUTCOME_OK;
		if (!ok[i])
		{
			sqlstate[i] = CStringGetTextDatum(sample->sqlstate);
			message[i] = CStringGetTextDatum(sample->message);
		}
	}

	values[0] = Int64GetDatum(self.id);
	values[1] = eight_byte_array(at, count, TIMESTAMPTZOID);
	values[2] = eight_byte_array(latency, count, FLOAT8OID);
	values[3] = text_array(outcome, NULL, count);
	values[4] = text_array(sqlstate, ok, count);
	values[5] = text_array(message, ok, count);
	rm_state_execute("INSERT INTO risky_migrations.probe_sample"
					 " (probe_id, at, latency_ms, outcome, sqlstate, message)"
					 " SELECT $1, s.* FROM unnest($2, $3, $4, $5, $6) AS s",
					 lengthof(types), types, values, NULL);
	return count;
}

/* ------------------------------------------------------------------------
 * The worker: its own work between ticks
 * ------------------------------------------------------------------------
 */

/*
 * Is somebody waiting for everybody to leave this database?  DROP DATABASE and
 * its like hold this lock while they do.
 */
static bool
database_is_wanted(void)
{
	LOCKTAG		tag;

	SET_LOCKTAG_OBJECT(tag, InvalidOid, DatabaseRelationId, MyDatabaseId, 0);
	if (LockAcquire(&tag, AccessShareLock, false, true) == LOCKACQUIRE_NOT_AVAIL)
		return true;
	LockRelease(&tag, AccessShareLock, false);
	return false;
}

/*
 * Takes the lock that shows that this probe runs, for as long as the process
 * lives.  *arg says whether we have it.
 */
static void
lock_id(void *arg)
{
	LOCKTAG		tag;

	set_probe_tag(&tag, self.id);
	*(bool *) arg =
		LockAcquire(&tag, ExclusiveLock, true, true) != LOCKACQUIRE_NOT_AVAIL;
}

/*
 * Do we still hold that lock?  A query may call pg_advisory_unlock_all(), and
 * then it is taken again.
 */
static void
keep_id_locked(void)
{
	LOCKTAG		tag;
	bool		locked;
	ErrorData  *error;

	set_probe_tag(&tag, self.id);
	if (!rm_holds_lock(&tag, ExclusiveLock))
		(void) try_transaction(InvalidOid, lock_id, &locked, &error);
}

/*
 * One transaction of our own work: looks whether there is a reason to end, and
 * stores samples.  A table of the same name that is not the one we began with
 * belongs to an extension that was dropped and made anew.
 */
static void
do_housekeeping(void *arg)
{
	Housekeeping *job = (Housekeeping *) arg;
	Oid			type = INT8OID;
	Datum		value = Int64GetDatum(self.id);

	begin_own_work(job->lock_timeout);
	if (rm_state_relid("probe", true) != self.relid)
		self.gone = true;
	else
	{
		rm_state_execute("SELECT ended_at IS NOT NULL"
						 " FROM risky_migrations.probe WHERE id = $1",
						 1, &type, &value, NULL);
		if (SPI_processed == 0)
			self.gone = true;
		else if (DatumGetBool(rm_result_datum(0, 1)))
			self.end_reason = "stopped";
		else if (database_is_wanted())
			self.end_reason = "database is being dropped or altered";
	}
	if (job->flush && !self.gone && self.nsamples > 0)
		job->nflushed = insert_samples();
	end_own_work();
}

/*
 * Notes in the server's log that our own work failed, unless it is something
 * that passes by itself or that the next look will understand.
 */
static void
log_failure(const ErrorData *error)
{
	if (error->sqlerrcode != ERRCODE_LOCK_NOT_AVAILABLE &&
		error->sqlerrcode != ERRCODE_QUERY_CANCELED &&
		error->sqlerrcode != ERRCODE_UNDEFINED_TABLE &&
		error->sqlerrcode != ERRCODE_FOREIGN_KEY_VIOLATION)
		ereport(LOG,
				(errcode(error->sqlerrcode),
				 errmsg("probe " INT64_FORMAT " could not store its samples: %s",
						self.id, error->message),
				 errdetail_plural("It keeps %d sample and tries again.",
								  "It keeps %d samples and tries again.",
								  self.nsamples, self.nsamples)));
}

/* Does our own work, and remembers from when to when.  True if it succeeded. */
static bool
housekeep(const char *lock_timeout)
{
	Housekeeping job = {0};
	ErrorData  *error;
	bool		ok;

	self.busy_from = now_us();
	job.lock_timeout = lock_timeout;
	job.flush = phase == PHASE_ENDING ||
		self.busy_from >= self.last_flush + FLUSH_INTERVAL ||
		(self.nsamples >= FLUSH_SAMPLES && !self.work_failed);

	ok = try_transaction(InvalidOid, do_housekeeping, &job, &error);
	if (ok)
		forget_samples(job.nflushed);
	else if (!self.work_failed)
		log_failure(error);

	self.work_failed = !ok;
	self.busy_until = now_us();
	self.last_check = self.busy_until;
	if (job.flush)
		self.last_flush = self.busy_until;
	(void) pgstat_report_stat(false);
	MemoryContextReset(self.tick_context);
	return ok;
}

/* When is our own work due? */
static int64
housekeeping_time(void)
{
	if (self.nsamples >= FLUSH_SAMPLES && !self.work_failed)
		return self.last_check;
	return self.last_check + CHECK_INTERVAL;
}

/*
 * How much of the time since then, the due time of a tick that was not run
 * yet, did we spend with our own work?  It would be unfair to count that as
 * the database's.
 */
static int64
own_work_since(int64 then)
{
	return Max(0, self.busy_until - Max(then, self.busy_from));
}

/* ------------------------------------------------------------------------
 * The worker: ticks
 * ------------------------------------------------------------------------
 */

/* Runs the query; *arg is how many milliseconds it may take. */
static void
run_query(void *arg)
{
	SPIExecuteOptions options = {0};
	EnableTimeoutParams timers[2] = {{0}, {0}};
	int			rc;

	debug_query_string = self.query;
	pgstat_report_activity(STATE_RUNNING, self.query);

	/* a cancel that came before try_transaction() cleared it */
	if (hurry)
		cancel_query();

	timers[0].id = STATEMENT_TIMEOUT;
	timers[0].type = TMPARAM_AFTER;
	timers[0].delay_ms = *(int *) arg;
	timers[1].id = self.watch;
	timers[1].type = TMPARAM_EVERY;
	timers[1].delay_ms = WATCH_INTERVAL;
	enable_timeouts(timers, 2);

	SPI_connect();
	PushActiveSnapshot(GetTransactionSnapshot());
	options.dest = None_Receiver;
	rc = SPI_execute_extended(self.query, &options);
	if (rc < 0)
		ereport(ERROR,
				(errcode(ERRCODE_FEATURE_NOT_SUPPORTED),
				 errmsg("a probe cannot run this statement: %s",
						SPI_result_code_string(rc)),
				 errdetail("Each run is a transaction of its own."),
				 errhint("Give a query, a statement that writes, or a DO block.")));
	PopActiveSnapshot();
	SPI_finish();
}

/*
 * Runs one tick, which is due, and keeps its sample.  What is so late that it
 * has no time left is not run at all.
 */
static void
run_tick(int64 tick)
{
	int64		from = due_time(tick) + own_work_since(due_time(tick));
	int64		left = from + self.timeout - now_us();
	int			left_ms = Max(1, (left + 999) / 1000);
	ErrorData  *error = NULL;
	int64		latency;
	bool		ok;
	bool		cancelled;

	if (left <= 0)
	{
		keep_sample(tick, self.timeout, OUTCOME_TIMEOUT, ERRCODE_QUERY_CANCELED,
					"not run: its time was over when the query before it ended");
		return;
	}

	ok = try_transaction(self.role, run_query, &left_ms, &error);
	latency = now_us() - from;
	cancelled = !ok && error->sqlerrcode == ERRCODE_QUERY_CANCELED;
	if (ok)
		keep_sample(tick, latency, OUTCOME_OK, 0, NULL);
	else if (cancelled && hurry)
		keep_sample(tick, latency, OUTCOME_TIMEOUT, error->sqlerrcode,
					"the probe was ended while the query ran");
	else
		keep_sample(tick, latency,
					cancelled && latency >= self.timeout
					? OUTCOME_TIMEOUT : OUTCOME_ERROR,
					error->sqlerrcode, error->message);

	debug_query_string = NULL;
	pgstat_report_activity(STATE_IDLE, NULL);
	(void) pgstat_report_stat(false);
	keep_id_locked();
	MemoryContextReset(self.tick_context);
}

/*
 * Is it time to end?  Then end_reason is set, or nothing is left to write to.
 * The time limit counts as reached when no further tick fits into it.
 */
static bool
must_end(void)
{
	if (self.gone)
		return true;
	if (terminated)
		self.end_reason = "terminated";
	else if (self.end_reason != NULL)
		hurry = true;
	else if (stop_asked)
		self.end_reason = "stopped";
	else if (self.next_tick * self.every >= self.time_limit)
		self.end_reason = "time limit";
	return self.end_reason != NULL;
}

/*
 * Runs the ticks when they are due, until it is time to end.  Our own work
 * waits for a pause, but not for ever.
 */
static void
run_schedule(void)
{
	while (!must_end())
	{
		int64		now = now_us();
		int64		due = due_time(self.next_tick);
		int64		housekeeping = housekeeping_time();

		if (due <= now)
		{
			run_tick(self.next_tick++);
			if (now_us() > housekeeping + CHECK_INTERVAL)
				(void) housekeep(PROBING_LOCK_TIMEOUT);
		}
		else if (housekeeping <= now)
			(void) housekeep(PROBING_LOCK_TIMEOUT);
		else
			sleep_until(Min(due, housekeeping));
	}
}

/*
 * Accounts for the ticks that are due but were not run: those who wait when
 * the probe is stopped have waited.  If there is no time to run them, all that
 * is known is that they took at least so long.
 */
static void
close_schedule(void)
{
	int64		end = Min(now_us(), self.began + self.time_limit);

	while (!self.gone && due_time(self.next_tick) < end)
	{
		int64		tick = self.next_tick++;
		int64		from = due_time(tick) + own_work_since(due_time(tick));
		int64		late = Max(0, now_us() - from);

		if (!hurry)
			run_tick(tick);
		else
			keep_sample(tick, Min(late, self.timeout), OUTCOME_TIMEOUT,
						ERRCODE_QUERY_CANCELED,
						"not run: the probe was ended before");
		CHECK_FOR_INTERRUPTS();
	}
}

/* ------------------------------------------------------------------------
 * The worker: beginning and end
 * ------------------------------------------------------------------------
 */

/* Waits for the end of the starter's transaction, *arg. */
static void
wait_for_starter(void *arg)
{
	(void) set_config_option("lock_timeout", "0", PGC_USERSET, PGC_S_SESSION,
							 GUC_ACTION_LOCAL, true, 0, false);
	XactLockTableWait(*(TransactionId *) arg, NULL, NULL, XLTW_None);
}

/* Sets the settings of a text[] of name=value for the session. */
static void
apply_settings(ArrayType *settings)
{
	Datum	   *elements;
	int			count;

	deconstruct_array(settings, TEXTOID, -1, false, TYPALIGN_INT,
					  &elements, NULL, &count);
	for (int i = 0; i < count; i++)
	{
		char	   *name = TextDatumGetCString(elements[i]);
		char	   *value = strchr(name, '=');

		if (value == NULL)
			continue;
		*value++ = '\0';
		(void) set_config_option(name, value, PGC_USERSET, PGC_S_SESSION,
								 GUC_ACTION_SET, true, 0, false);
	}
}

/*
 * Reads the probe's row.  If there is none, or it has ended, there is nothing
 * to do: the starter has rolled back, or stopped the probe again.
 *
 * The row is locked.  An rm_probe_stop() that did not see us has it locked
 * before, so we find that it has ended, or after, and then its second look
 * sees us.
 */
static void
load_probe(void *arg)
{
	Oid			type = INT8OID;
	Datum		value = Int64GetDatum(self.id);

	begin_own_work("0");
	self.relid = rm_state_relid("probe", true);
	self.gone = true;
	if (OidIsValid(self.relid))
	{
		rm_state_execute("SELECT owner, query, every, timeout, time_limit, settings"
						 " FROM risky_migrations.probe"
						 " WHERE id = $1 AND ended_at IS NULL FOR NO KEY UPDATE",
						 1, &type, &value, NULL);
		if (SPI_processed == 1)
		{
			self.gone = false;
			self.role = DatumGetObjectId(rm_result_datum(0, 1));
			self.query = MemoryContextStrdup(TopMemoryContext,
											 rm_result_text(0, 2));
			self.every = interval_microseconds(rm_result_datum(0, 3));
			self.timeout = interval_microseconds(rm_result_datum(0, 4));
			self.time_limit = interval_microseconds(rm_result_datum(0, 5));
			apply_settings(DatumGetArrayTypeP(rm_result_datum(0, 6)));
		}
	}
	end_own_work();
}

/* Notes in the row that the probe has ended; *arg is the reason. */
static void
mark_ended(void *arg)
{
	Oid			types[] = {INT8OID, TEXTOID};
	Datum		values[lengthof(types)];

	begin_own_work(ENDING_LOCK_TIMEOUT);
	values[0] = Int64GetDatum(self.id);
	values[1] = CStringGetTextDatum((char *) arg);
	rm_state_execute("UPDATE risky_migrations.probe"
					 " SET ended_at = clock_timestamp(), end_reason = $2"
					 " WHERE id = $1 AND ended_at IS NULL",
					 lengthof(types), types, values, NULL);
	end_own_work();
}

/*
 * Stores what is not stored yet, and the end.  Tries again where somebody is
 * in the way, but only for a moment: somebody may wait for our end.
 */
static void
finish(void)
{
	int			tries = terminated ? 2 : 5;
	const char *reason = self.end_reason;
	ErrorData  *error;

	while (self.nsamples > 0 && !self.gone && tries > 0)
		if (!housekeep(ENDING_LOCK_TIMEOUT))
			tries--;
	if (self.gone)
		return;

	self.lost_samples += self.nsamples;
	if (self.lost_samples > 0)
	{
		reason = psprintf("%s (" INT64_FORMAT " samples lost)",
						  reason, self.lost_samples);
		ereport(LOG,
				(errmsg("probe " INT64_FORMAT " has lost " INT64_FORMAT " samples that could not be stored",
						self.id, self.lost_samples)));
	}
	for (tries = terminated ? 1 : 3; tries > 0; tries--)
		if (try_transaction(InvalidOid, mark_ended, unconstify(char *, reason),
							&error))
			break;
}

/*
 * Takes the lock on the probe's id.  A worker of an extension that was dropped
 * a moment ago may still have the same id, so this waits a little.
 */
static bool
acquire_id(void)
{
	int64		deadline = now_us() + ID_LOCK_PATIENCE * 1000;
	bool		locked = false;
	ErrorData  *error;

	while (!stop_asked)
	{
		if (try_transaction(InvalidOid, lock_id, &locked, &error) && locked)
			return true;
		if (now_us() > deadline)
			break;
		sleep_until(now_us() + 20000);
	}
	return false;
}

/*
 * Connects, as the starter's session user, and prepares self.  SIGTERM ends the
 * process in the ordinary way until there is something to be saved.
 */
static void
connect_worker(const ProbeOrder *order)
{
	pqsignal(SIGTERM, die);
	pqsignal(SIGHUP, SignalHandlerForConfigReload);
	BackgroundWorkerUnblockSignals();
	BackgroundWorkerInitializeConnectionByOid(order->database,
											  order->session_user,
											  RM_WORKER_CONNECT_FLAGS);
	HOLD_CANCEL_INTERRUPTS();
	pqsignal(SIGTERM, handle_terminate);
	pqsignal(SIGUSR2, handle_stop);

	self.id = order->id;
	self.samples = MemoryContextAlloc(TopMemoryContext,
									  sizeof(Sample) * MAX_SAMPLES);
	self.tick_context = AllocSetContextCreate(TopMemoryContext, "probe tick",
											  ALLOCSET_DEFAULT_SIZES);
	self.watch = RegisterTimeout(USER_TIMEOUT, watch_over);
	self.wait_event = rm_wait_event("RiskyMigrationsProbe");
	MemoryContextSwitchTo(self.tick_context);
}

/*
 * Entry point of the worker.  The lock on the id is taken before the row is
 * read: whoever sees neither lock nor end in the row can end the probe by
 * writing that into the row.
 */
void
rm_probe_main(Datum main_arg)
{
	ProbeOrder	order;
	ErrorData  *error;
	char	   *reason;

	memcpy(&order, MyBgworkerEntry->bgw_extra, sizeof(order));
	connect_worker(&order);

	if (!acquire_id() ||
		!try_transaction(InvalidOid, wait_for_starter, &order.starter, &error))
		return;
	if (!try_transaction(InvalidOid, load_probe, NULL, &error))
	{
		if (stop_asked || !OidIsValid(self.relid))
			return;
		reason = psprintf("error: %s", error->message);
		self.end_reason = MemoryContextStrdup(TopMemoryContext, reason);
	}
	MemoryContextReset(self.tick_context);

	/* from here on a stop request lets what is due run; was there one before? */
	phase = PHASE_PROBING;
	if (stop_asked && self.end_reason == NULL)
		self.end_reason = terminated ? "terminated" : "stopped";
	if (self.end_reason == NULL)
	{
		self.began = self.last_check = self.last_flush = now_us();
		self.began_at = GetCurrentTimestamp();
		run_schedule();
		close_schedule();
	}
	phase = PHASE_ENDING;
	finish();
}
